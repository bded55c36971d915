"""All or nothing: whatever goes wrong, and wherever, the model is as it was before the call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import StalePlan
from tests.swap.helpers import (
    CHANNELS,
    HOOKS,
    TARGETS,
    NormReLU,
    Snapshot,
    batch_net,
    filled,
    same_state,
)

OTHERS = [name for name in TARGETS if name != "bn"]
ERRORS = [RuntimeError, MemoryError, KeyboardInterrupt]


def three_norms() -> Any:
    """Three BatchNorms in a row, one of them under two names, with hooks and flags to lose."""
    model = filled(nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(3))))
    model.add_module("again", model[1])
    for register in HOOKS.values():
        register(model[1], lambda *_: None)
    model[2].weight.requires_grad_(False)
    return model


def failing_at(nth: int, function: Any, error: type[BaseException], *, after: bool = False) -> Any:
    """The function, but its nth call raises, before or after it has done its work."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs) if calls != nth or after else None
        if calls == nth:
            raise error("injected")
        return result

    return failing


class Children(dict):
    """The children of a module; setting one may raise."""

    def fail_at(self, nth: int, error: type[BaseException], *, after: bool) -> None:
        self.set = failing_at(nth, super().__setitem__, error, after=after)

    def __setitem__(self, name: str, child: Any) -> None:
        self.set(name, child)


def brittle(model: nn.Module, nth: int, error: type[BaseException], *, after: bool) -> None:
    """Let the nth replacement of a child of the model fail."""
    children = Children(model._modules)
    children.fail_at(nth, error, after=after)
    model._modules = children


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_norm_that_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, nth: int, error: type[BaseException]
) -> None:
    model = three_norms()
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.GroupNorm, "__init__", failing_at(nth, nn.GroupNorm.__init__, error))
        with pytest.raises(error, match="injected"):
            normswap.convert(model, "gn")
    before.assert_kept(model, untouched=True)
    assert len(normswap.report(normswap.convert(model, "gn"))) == 3


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn", "gn"])
def test_a_child_that_cannot_be_replaced(
    target: str, nth: int, error: type[BaseException], after: bool
) -> None:
    """Four names are set for three norms; each of them may be the one that fails."""
    model = three_norms()
    brittle(model, nth, error, after=after)
    before = Snapshot(model)
    with pytest.raises(error, match="injected"):
        normswap.convert(model, target)
    before.assert_kept(model)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_a_value_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, nth: int, error: type[BaseException], after: bool
) -> None:
    """Matching writes three weights and three biases."""
    model = three_norms()
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        copy = failing_at(nth, torch.Tensor.copy_, error, after=after)
        patch.setattr(torch.Tensor, "copy_", copy)
        with pytest.raises(error, match="injected"):
            normswap.convert(model, "gn")
    before.assert_kept(model)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_a_flag_that_cannot_be_set(monkeypatch: pytest.MonkeyPatch, nth: int, after: bool) -> None:
    model = three_norms()
    before = Snapshot(model)
    with monkeypatch.context() as patch:
        require = failing_at(nth, torch.Tensor.requires_grad_, KeyboardInterrupt, after=after)
        patch.setattr(torch.Tensor, "requires_grad_", require)
        with pytest.raises(KeyboardInterrupt):
            normswap.convert(model, "frozen_bn")
    before.assert_kept(model)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
def test_a_revert_that_fails_leaves_the_model_converted(
    target: str, nth: int, error: type[BaseException], after: bool
) -> None:
    model = three_norms()
    original = Snapshot(model)
    normswap.convert(model, target, where="*")
    children = model._modules
    brittle(model, nth, error, after=after)
    before = Snapshot(model)
    with pytest.raises(error, match="injected"):
        normswap.revert(model)
    before.assert_kept(model)
    children.update(model._modules)
    model._modules = children
    original.assert_kept(normswap.revert(model))


def interrupted(call: Callable[[], object], nth: int) -> bool:
    """Run a call and interrupt it at the nth line of the package's conversion code.

    Returns whether it got that far.
    """
    folder = str(Path(normswap.__file__).parent / "swap")
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            lines += 1
            if lines == nth:
                raise KeyboardInterrupt
        return trace

    earlier, gradients = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(earlier)
        torch.set_grad_enabled(gradients)  # in case it came on the way out of torch.no_grad()
    return False


def skipping_net() -> Any:
    """A BatchNorm that can be converted, under two names, and one that cannot."""
    model = filled(nn.Sequential(nn.BatchNorm2d(CHANNELS), NormReLU(CHANNELS)))
    model.add_module("again", model[0])
    return model


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
def test_an_interrupt_at_any_line_leaves_no_half_converted_model() -> None:
    """The model is as it was or, where the interrupt comes last, converted to the last detail."""
    model = skipping_net()
    plain = Snapshot(model)
    normswap.convert(model, "gn")
    report = list(normswap.report(model))
    values = {key: value.clone() for key, value in model.state_dict().items()}
    normswap.revert(model)
    nth = 1
    while interrupted(lambda: normswap.convert(model, "gn"), nth):
        if isinstance(model[0], nn.GroupNorm):
            assert model.again is model[0]
            assert list(normswap.report(model)) == report, f"interrupted at line {nth}"
            for key, value in model.state_dict().items():
                assert torch.equal(value, values[key])
            normswap.revert(model)
        plain.assert_kept(model)
        nth += 1
    assert nth > 50


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", ["identity", "gn"])
def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(target: str) -> None:
    model = skipping_net()
    before = Snapshot(model)
    with pytest.raises(normswap.NormSwapWarning):
        normswap.convert(model, target)
    before.assert_kept(model)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_made_an_error_leaves_the_context_manager_undone() -> None:
    model = skipping_net()
    before = Snapshot(model)
    with pytest.raises(normswap.NormSwapWarning), normswap.converted(model, "gn"):
        pytest.fail("the block is not entered")
    before.assert_kept(model)


# -- plans that have gone stale -----------------------------------------------------------------


def assert_stale(plan: Any, model: nn.Module) -> None:
    before = Snapshot(model)
    with pytest.raises(StalePlan):
        plan.apply()
    before.assert_kept(model, untouched=True)


def test_a_plan_is_stale_once_it_was_applied() -> None:
    model = batch_net()
    plan = normswap.plan(model, "gn")
    plan.apply()
    assert_stale(plan, model)


def test_a_plan_is_stale_once_a_norm_was_replaced() -> None:
    model = three_norms()
    plan = normswap.plan(model, "gn")
    model[2] = nn.BatchNorm2d(CHANNELS)
    assert_stale(plan, model)


def test_a_plan_is_stale_once_a_norm_is_gone() -> None:
    model = three_norms()
    plan = normswap.plan(model, "gn")
    del model[2]
    assert_stale(plan, model)


def test_a_plan_is_stale_once_the_model_has_other_tensors() -> None:
    """What was read of the source is no longer true: its statistics are in double precision."""
    model = batch_net()
    plan = normswap.plan(model, "sync_bn")
    model.double()
    assert_stale(plan, model)


def test_a_plan_is_stale_once_a_weight_was_replaced() -> None:
    model = batch_net()
    plan = normswap.plan(model, "sync_bn")
    model[1].weight = nn.Parameter(torch.ones(CHANNELS))
    assert_stale(plan, model)


def test_a_plan_outlives_a_change_of_mode_and_of_values() -> None:
    model, other = batch_net(), filled(batch_net(), seed=9)
    plan = normswap.plan(model, "gn")
    model.eval().load_state_dict(other.state_dict())
    plan.apply()
    expected = normswap.convert(other, "gn")
    assert not model[1].training
    assert same_state(model, expected)


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.convert(batch_net(), "gn")
