"""Norms that do not divide by the plain variance: what training keeps, and what pooling finds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.norms.measured import MeasuredNorm
from normswap.stats import bookmark
from tests.reference import formulas
from tests.reference.data import close, values
from tests.stats.models import cut

OPTIONS = [
    {},
    {"kappa": 0.0},
    {"unbiased": False},
    {"kappa": 1.0, "sync": True},
    {"norm": "ssn", "delta": 0.5},
]
SHAPES = [(20, 4, 6, 5), (20, 4, 2), (20, 4), (20, 4, 1)]


def mixing(shape: tuple[int, ...], norm: str = "sn", **options: Any) -> nn.Sequential:
    """Switchable norms with a layer between."""
    sizes = [normswap.build(norm, 4, dim=max(len(shape) - 2, 1), **options) for _ in range(2)]
    return nn.Sequential(sizes[0], nn.Tanh(), sizes[1]).double().eval()


def trained(model: nn.Module, batches: list[Tensor], momentum: float | None) -> nn.Module:
    """The same after training has seen the batches."""
    model = copy.deepcopy(model)
    for norm in norms(model):
        norm.momentum = momentum
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model


def norms(model: nn.Module) -> list[MeasuredNorm]:
    return [module for module in model.modules() if isinstance(module, MeasuredNorm)]


def assert_keeps_the_same(model: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(norms(model), norms(other), strict=True):
        close(ours.running_mean, theirs.running_mean)
        close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("sizes", [[20], [8, 8, 4], [1] * 20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_population_is_what_training_keeps_of_the_whole(
    options: dict[str, Any], shape: tuple[int, ...], sizes: list[int]
) -> None:
    model, data = mixing(shape, **options), values(*shape) * 3 + 7
    wanted = trained(model, [data], 1.0)
    normswap.warmup(model, cut(data, sizes), method="population")
    assert_keeps_the_same(model, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_moving_average_is_what_training_keeps(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    model, data = mixing(shape, **options), values(*shape) * 3 + 7
    wanted = trained(model, cut(data, [8, 8, 4]), 0.1)
    normswap.warmup(model, cut(data, [8, 8, 4]), method="ema")
    assert_keeps_the_same(model, wanted)


@pytest.mark.parametrize("offset", [7, 5000])
def test_a_moving_average_far_from_zero_stays_in_the_norms_own_terms(offset: float) -> None:
    norm, data = normswap.build("sn", 4), (values(8, 4, 2, 2) + offset).float()
    wanted = trained(norm, [data], 0.1)
    normswap.warmup(norm, [data], method="ema")
    assert torch.equal(norm.running_var, wanted.running_var)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_pooled_is_the_plain_mean_and_variance(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    norm, data = mixing(shape, **options)[0], values(*shape) * 3 + 7
    normswap.warmup(norm, cut(data, [8, 8, 4]))
    mean, var = formulas.mean_and_unbiased_var(data)
    close(norm.running_mean, mean)
    close(norm.running_var, var)


def test_a_norm_that_is_called_twice_keeps_what_it_divides_by_of_both_calls() -> None:
    norm, data = normswap.build("sn", 4).double(), values(20, 4, 3)
    model = nn.Sequential(norm, nn.Tanh(), norm).eval()
    first = trained(norm, [data], 1.0)
    first.eval()
    with torch.no_grad():
        again = first(data).tanh()
    wanted = trained(norm, [torch.cat([data, again])], 1.0)
    normswap.warmup(model, cut(data, [8, 8, 4]), method="population")
    assert_keeps_the_same(norm, wanted)


def test_it_goes_on_from_a_bookmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookmark, "SHARE", float("inf"))
    data = values(20, 4, 6, 5)
    wanted = trained(mixing(data.shape), [data], 1.0)
    kept = bookmark.Bookmark.remove
    monkeypatch.setattr(bookmark.Bookmark, "remove", lambda self: None)
    normswap.warmup(
        mixing(data.shape), cut(data, [8, 12]), method="population", resume=tmp_path / "pass"
    )
    monkeypatch.setattr(bookmark.Bookmark, "remove", kept)
    model = mixing(data.shape)
    normswap.warmup(model, cut(data, [8, 12]), method="population", resume=tmp_path / "pass")
    assert_keeps_the_same(model, wanted)
