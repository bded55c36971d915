"""Transferable normalization beyond its formula: its start, its end, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling
from tests.norms.cases import CHANNELS, set_statistics
from tests.reference.data import close, fill, values


def batch_norm() -> nn.Sequential:
    return nn.Sequential(set_statistics(fill(nn.BatchNorm2d(CHANNELS)))).eval()


def trained() -> Any:
    """One whose channels count differently."""
    model = normswap.convert(batch_norm(), "transnorm").train()
    for seed in range(3):
        x = values(4, CHANNELS, 3, 2, seed=seed)
        x[2:] += values(CHANNELS, seed=seed + 5)[:, None, None]
        model(x)
    return model.eval()


def test_it_starts_with_half_the_weight_as_it_doubles_it() -> None:
    model, x = batch_norm(), values(4, CHANNELS, 3, 2)
    expected, weight = model(x), model[0].weight.detach().clone()
    (step,) = normswap.plan(model, "transnorm")
    assert str(step.fidelity) == "eval"
    close(normswap.convert(model, "transnorm")(x), expected)
    close(model[0].weight, weight / 2)


@pytest.mark.parametrize("target", ["bn", "frozen_bn", "batch_renorm", "iebn"])
def test_channels_that_count_differently_go_on_doing_so_elsewhere(target: str) -> None:
    model, x = trained(), values(4, CHANNELS, 3, 2, seed=9)
    expected = model(x)
    assert str(normswap.plan(model, target, where="*")[0].fidelity) == "eval"
    close(normswap.convert(model, target, where="*")(x), expected)


def test_a_match_takes_them_into_account() -> None:
    """On a sample of expected statistics a group norm of one channel gives the same."""
    model = trained()
    norm = model[0]
    x = values(1, CHANNELS, 8, 5)
    x = (x - x.mean((2, 3), keepdim=True)) / x.var((2, 3), keepdim=True, correction=0).sqrt()
    x = x * norm.running_var_target.sqrt()[:, None, None] + norm.running_mean_target[:, None, None]
    expected = model(x)
    close(normswap.convert(model, "in", where="*", example_inputs=x)(x), expected)


def test_evaluation_takes_all_for_the_target() -> None:
    norm: Any = trained()[0]
    x, other = values(4, CHANNELS, 3, 2), copy.deepcopy(norm)
    other.running_mean_source.add_(3)
    assert not torch.allclose(norm(x), other(x))  # it still tells how much channels count
    y = norm(x)
    close(norm(x.flip(0)).flip(0), y)
    close(torch.cat([norm(x[:1]), norm(x[1:])]), y)


def test_both_halves_have_the_odd_ones() -> None:
    norm: Any = normswap.build("transnorm", CHANNELS, momentum=1.0).double()
    x = values(5, CHANNELS, 3, 2)
    norm(x)
    close(norm.running_mean_source, x[:2].mean((0, 2, 3)))
    close(norm.running_mean_target, x[2:].mean((0, 2, 3)))


@pytest.mark.parametrize(("shape", "why"), [((1, 3, 2), "one sample"), ((3,), "single value")])
def test_a_half_needs_two_values(shape: tuple[int, ...], why: str) -> None:
    norm = normswap.build("transnorm", CHANNELS)
    size, *positions = shape
    x = values(size, CHANNELS, *positions).float()
    with pytest.raises(DegeneratePooling, match=why):
        norm(x)
    assert norm.num_batches_tracked == 0
    assert norm.eval()(x).isfinite().all()
