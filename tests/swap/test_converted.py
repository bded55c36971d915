"""The context manager: converted inside, as before outside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.swap.helpers import (
    SOURCES,
    TARGETS,
    TRACKING,
    NormReLU,
    Snapshot,
    batch_net,
    filled,
    image,
    meeting,
    numbers,
    outputs,
    same_bits,
    same_state,
    train_step,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

every_target = pytest.mark.parametrize("target", TARGETS)


@every_target
@pytest.mark.parametrize("source", ["BatchNorm2d", "SyncBatchNorm", "frozen_bn"])
def test_converted_inside_and_as_before_outside(source: str, target: str) -> None:
    model = SOURCES[source].model()
    before = Snapshot(model)
    with normswap.converted(model, target, where="*") as inside:
        assert inside is model
        assert {s.kind for s in normswap.find(model)} == {normswap.spec(target).entry.kind}
        model(model.example())
    reset_statistics(model, before)
    before.assert_kept(model)
    assert list(normswap.report(model)) == []


def reset_statistics(model: nn.Module, before: Snapshot) -> None:
    """Undo what a forward in train mode has done to statistics."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffer.copy_(before.values[path][name][0])


@every_target
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_as_before_when_the_block_raises(target: str, error: type[BaseException]) -> None:
    model = SOURCES["BatchNorm2d"].model()
    before = Snapshot(model)
    with pytest.raises(error), normswap.converted(model, target, where="*"):
        raise error
    before.assert_kept(model)


@pytest.mark.parametrize(
    ("first", "target"),
    [
        (first, target)
        for first in TARGETS
        for target in TARGETS
        if first != "bn" and (first in TRACKING or target != "frozen_bn")
        if meeting(first, target)
    ],
)
def test_inside_a_converted_model_it_leaves_the_first_conversion(first: str, target: str) -> None:
    """A is converted to B; after the block with C it is B again, and reverts to A."""
    model = SOURCES["BatchNorm2d"].model()
    original = Snapshot(model)
    normswap.convert(model, first)
    before, report = Snapshot(model), list(normswap.report(model))
    with normswap.converted(model, target, where="*", example_inputs=model.example()):
        model(model.example())
    reset_statistics(model, before)
    before.assert_kept(model)
    assert list(normswap.report(model)) == report
    normswap.revert(model)
    original.assert_kept(model)


def test_blocks_in_blocks() -> None:
    model = batch_net()
    original = Snapshot(model)
    with normswap.converted(model, "gn"):
        outer = Snapshot(model)
        with normswap.converted(model, "in"):
            assert isinstance(model[1], nn.InstanceNorm2d)
        outer.assert_kept(model)
    original.assert_kept(model)


@pytest.mark.parametrize("first", [None, "sync_bn"])
def test_a_conversion_inside_the_block_does_not_outlive_it(first: str | None) -> None:
    model = batch_net()
    if first:
        normswap.convert(model, first)
    before = Snapshot(model)
    with normswap.converted(model, "gn"):
        normswap.convert(model, "in")
    before.assert_kept(model)


@pytest.mark.parametrize("first", [None, "sync_bn"])
def test_a_revert_inside_the_block_does_not_outlive_it(first: str | None) -> None:
    model = batch_net()
    if first:
        normswap.convert(model, first)
    before = Snapshot(model)
    with normswap.converted(model, "gn"):
        normswap.revert(model)
    before.assert_kept(model)


def test_a_part_of_a_model() -> None:
    model = nn.ModuleDict({"a": batch_net(), "b": batch_net()})
    before = Snapshot(model)
    with normswap.converted(model, "gn", where="a.*"):
        assert isinstance(model["a"][1], nn.GroupNorm)
        assert isinstance(model["b"][1], nn.BatchNorm2d)
    before.assert_kept(model)


def test_of_a_submodule_leaves_the_conversions_around_it() -> None:
    model = nn.ModuleDict({"a": batch_net(), "b": batch_net()})
    normswap.convert(model, "sync_bn")
    before = Snapshot(model)
    with normswap.converted(model["a"], "gn"):
        assert isinstance(model["b"][1], nn.SyncBatchNorm)
    before.assert_kept(model)


def test_a_model_that_is_a_norm() -> None:
    norm = filled(nn.BatchNorm2d(8))
    before = Snapshot(norm)
    with normswap.converted(norm, "gn") as inside:
        assert isinstance(inside, nn.GroupNorm)
        inside(numbers(2, 8, 4, 4))
    before.assert_kept(norm)


def test_training_inside_the_block_is_kept_where_the_values_are_carried() -> None:
    model, expected = batch_net(), batch_net()
    with normswap.converted(model, "sync_bn"):
        train_step(model, image(), torch.optim.SGD(model.parameters(), lr=0.1))
    train_step(expected, image(), torch.optim.SGD(expected.parameters(), lr=0.1))
    assert same_state(model, expected)


def test_a_change_of_precision_inside_the_block() -> None:
    model, expected = batch_net(), batch_net().double()
    with normswap.converted(model, "gn"):
        model.double()
    assert same_state(model, expected)


def test_what_was_skipped_inside_is_forgotten_and_what_was_before_is_not() -> None:
    model = batch_net(NormReLU(8))
    normswap.convert(model, "sync_bn")
    before = list(normswap.report(model))
    with normswap.converted(model, "gn"):
        assert [row.to for row in normswap.report(model)] == ["gn", "gn"]
    assert list(normswap.report(model)) == before


def test_it_takes_what_plan_takes() -> None:
    model = batch_net()
    arguments: dict[str, Any] = {"where": "1", "carry": "copy", "num_groups": 4}
    with normswap.converted(model, "gn", **arguments):
        assert model[1].num_groups == 4
        assert same_bits(model[1].weight, batch_net()[1].weight)


def test_a_refusal_leaves_the_block_unentered() -> None:
    model = batch_net()
    before = Snapshot(model)
    with pytest.raises(normswap.NormSwapError), normswap.converted(model, "gn", num_groups=3):
        pytest.fail("the block is not entered")
    before.assert_kept(model, untouched=True)


def test_a_copy_taken_inside_reverts_by_itself() -> None:
    model = batch_net()
    with normswap.converted(model, "gn"):
        clone = copy.deepcopy(model)
    assert isinstance(clone[1], nn.GroupNorm)
    assert same_state(normswap.revert(clone), model)
    assert same_bits(outputs(clone, image()), outputs(model, image()))
