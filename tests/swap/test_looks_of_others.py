"""What other tools do with a converted model: tracing, exporting, copying, compiling."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.swap.helpers import TARGETS, batch_net, image, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

ALL = [*TARGETS, "fold"]


def converted(target: str) -> Any:
    return normswap.convert(batch_net(), target).eval()


@pytest.mark.parametrize("target", ALL)
def test_torch_fx_keeps_its_norms_whole(target: str) -> None:
    """As it does torch's own: walking into one would freeze its mode."""
    model = converted(target)
    traced = torch.fx.symbolic_trace(model)
    assert "1" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert same_bits(traced(image()), model(image()))


@pytest.mark.parametrize("target", ALL)
def test_torch_export(target: str) -> None:
    model = converted(target)
    exported = torch.export.export(model, (image(),)).module()
    torch.testing.assert_close(exported(image()), model(image()))


@pytest.mark.parametrize("target", ALL)
def test_dynamo_captures_it_as_one_graph(target: str) -> None:
    torch._dynamo.reset()
    model = converted(target)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), model(image()))


class Pickled(nn.Module):
    """A class that is not registered, at module level."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, num_features, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    "to", [Pickled, lambda c: Pickled(c), lambda site: Pickled(site.num_features)]
)
def test_a_model_with_a_class_that_is_not_registered_can_be_pickled(to: Any) -> None:
    model = normswap.convert(batch_net(), to)
    again = pickle.loads(pickle.dumps(model))
    assert same_bits(again(image()), model(image()))
    assert type(normswap.revert(again)[1]) is nn.BatchNorm2d
