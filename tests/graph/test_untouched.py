"""Finding and looking leave nothing behind in the model."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.graph.models import Branching, Caching, Counting, Masked, block, image
from tests.reference.footprint import footprint, random_states

MODELS = [block, Branching, Caching, Counting, Masked]
each_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def look_at_everything(model: nn.Module, example_inputs: Any = None) -> None:
    sites = normswap.find(model, example_inputs)
    for site in sites:
        _ = site.producer, site.activation, site.calls, site.order
    _ = sites.blind, str(sites)


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_tracing_changes_nothing(make: Any, training: bool) -> None:
    model = make().train(training)
    before = footprint(model)
    look_at_everything(model)
    assert footprint(model) == before


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_observing_example_inputs_changes_nothing(make: Any, training: bool) -> None:
    model = make().train(training)
    before = footprint(model)
    look_at_everything(model, image())
    assert footprint(model) == before


class Random(nn.Module):
    """Draws numbers that do not depend on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x + torch.rand(1) + random.random() + numpy.random.rand())


@pytest.mark.parametrize("example_inputs", [None, image()], ids=["tracing", "observing"])
def test_random_states_stay(example_inputs: Tensor | None) -> None:
    model = Random()
    before = random_states()
    look_at_everything(model, example_inputs)
    assert random_states() == before


def test_modes_that_differ_stay_different() -> None:
    model = nn.Sequential(block().eval(), block())
    before = footprint(model)
    look_at_everything(model, image())
    assert footprint(model) == before


def test_tracing_does_not_run_the_users_hooks() -> None:
    model, seen = nn.Sequential(block(), block()), list[Any]()
    model[0].register_forward_hook(lambda *call: seen.append(call))
    model[1].register_forward_pre_hook(lambda *call: seen.append(call))
    look_at_everything(model)
    assert seen == []


def test_hooks_stay_and_work() -> None:
    model, seen = block(), list[Any]()
    handle = model[1].register_forward_hook(lambda *call: seen.append(call))
    look_at_everything(model, image())
    seen.clear()
    model(image())
    assert len(seen) == 1
    handle.remove()
    model(image())
    assert len(seen) == 1


def test_a_failure_while_observing_changes_nothing() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = block()

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inside(x)
            raise LookupError("not today")

    model = Failing()
    before = footprint(model)
    with pytest.raises(LookupError):
        normswap.find(model, image())
    assert footprint(model) == before
