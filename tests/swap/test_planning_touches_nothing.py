"""Finding and planning look at a model and leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.swap.helpers import CHANNELS, SOURCES, TARGETS, Snapshot, Source, image, pairs

#: Calls that look only; those that need more than the modules trace the model or run it.
LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "find": normswap.find,
    "find, printed": lambda model: str(normswap.find(model)),
    "find with inputs": lambda model: normswap.find(model, image()),
    "plan": lambda model: normswap.plan(model, "gn", where="*"),
    "plan of the dimension": lambda model: normswap.plan(model, "bn", where="*"),
    "plan with inputs": lambda model: normswap.plan(model, "bn", where="*", example_inputs=image()),
    "plan, printed": lambda model: str(normswap.plan(model, "gn", where="*")),
    "report": normswap.report,
}

every_look = pytest.mark.parametrize("look", LOOKS)


@pytest.mark.parametrize(("source", "target"), pairs())
def test_a_plan_touches_nothing(source: Source, target: str) -> None:
    model = source.model()
    before = Snapshot(model)
    normswap.plan(model, target, where="*")
    normswap.plan(model, target, where="*", example_inputs=model.example())
    before.assert_kept(model, untouched=True)


class Observed(nn.Module):
    """A model with all that notices when it is run: hooks, counters, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.inner = nn.Sequential(nn.GroupNorm(2, CHANNELS), nn.Dropout())
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.register_buffer("runs", torch.zeros(()))
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.log.append(x)
        return self.norm(self.conv(x)) + self.inner(self.conv(x)) + torch.rand(())


@every_look
def test_the_model_is_as_it_was(look: str) -> None:
    model = Observed()
    before = Snapshot(model)
    LOOKS[look](model)
    before.assert_kept(model, untouched=True)
    assert model.runs == 0
    assert model.log == []


@every_look
def test_random_numbers_go_on_as_before(look: str) -> None:
    model = Observed()
    state = torch.get_rng_state()
    LOOKS[look](model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("look", [look for look in LOOKS if "inputs" not in look])
def test_hooks_of_the_user_are_not_called(look: str) -> None:
    """They would be called with what is no tensor, and count runs that there were not."""
    model = Observed()
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    LOOKS[look](model)
    assert called == []


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_every_module_stays(mode: bool) -> None:
    model = Observed().train(mode)
    model.norm.train(not mode)
    normswap.plan(model, "bn", where="*", example_inputs=image())
    assert model.norm.training is not mode
    assert model.training is mode


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_that_is_not_applied_leaves_the_other_one_valid(target: str) -> None:
    model = SOURCES["BatchNorm2d"].model()
    first = normswap.plan(model, "gn")
    normswap.plan(model, target, where="*")
    assert isinstance(first.apply().norm1, nn.GroupNorm)
