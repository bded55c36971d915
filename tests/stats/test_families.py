"""Every norm that keeps running statistics can be warmed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.data import close, values
from tests.reference.ranks import lone_rank
from tests.stats.models import assert_keeps_all_of, cut, images

SHAPES = {1: (9, 2, 4), 2: (9, 2, 4, 3), 3: (9, 2, 2, 3, 2)}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    with lone_rank(tmp_path):
        yield


BATCH_NORMS = [
    ("bn", {}),
    ("bn", {"sync": True}),
    ("sync_bn", {}),
    ("sn", {}),
    ("sn", {"sync": True, "kappa": 1.0}),
    ("ssn", {"delta": 0.5}),
    ("ghost_bn", {"group_size": 2}),
]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(("norm", "options"), BATCH_NORMS)
def test_built_batch_norms(norm: str, options: dict[str, Any], dim: int) -> None:
    model, data = normswap.build(norm, 2, dim=dim, **options).double(), values(*SHAPES[dim])
    normswap.warmup(model, cut(data, [4, 5]))
    assert_keeps_all_of(model, data)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_built_instance_norms(dim: int) -> None:
    model, data = normswap.build("in", 2, dim=dim, track_running_stats=True), values(*SHAPES[dim])
    normswap.warmup(model.double(), cut(data, [4, 5]))
    positions = tuple(range(2, 2 + dim))
    close(model.running_mean, data.mean(positions).mean(0))
    close(model.running_var, data.var(positions).mean(0))


def test_torchs_sync_batch_norm_in_one_process() -> None:
    model = nn.SyncBatchNorm(2).double()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model, images(9))


@pytest.mark.parametrize("make", [nn.SyncBatchNorm, lambda size: normswap.build("sync_bn", size)])
def test_a_sync_batch_norm_in_a_group_of_one(alone: None, make: Any) -> None:
    model = make(2).double()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model, images(9))


@pytest.mark.parametrize("make", [nn.SyncBatchNorm, lambda size: normswap.build("sync_bn", size)])
def test_a_sync_batch_norm_that_is_called_by_keyword(alone: None, make: Any) -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    model = ByKeyword()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model.norm, images(9))


def test_a_batch_norm_of_tokens() -> None:
    model = normswap.convert(nn.Sequential(nn.LayerNorm(3)), "bn", where="*", carry="copy")
    data = values(6, 4, 3)
    normswap.warmup(model.double(), cut(data, [4, 2]))
    assert_keeps_all_of(model[0], data.transpose(1, 2))


def test_a_single_token_counts() -> None:
    model = normswap.convert(nn.Sequential(nn.LayerNorm(3)), "bn", where="*", carry="copy")
    data = values(6, 1, 3)
    normswap.warmup(model.double(), cut(data, [1, 5]))
    assert_keeps_all_of(model[0], data.transpose(1, 2))


def test_a_batch_norm_without_affine() -> None:
    model = nn.BatchNorm2d(2, affine=False).double()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model, images(9))


def test_a_subclass() -> None:
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Doubling(2).double()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model, images(9))


def test_a_batch_norm_whose_weight_is_parametrized() -> None:
    class Squared(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.square()

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).double()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Squared())
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model[0], images(9))


def test_a_converted_model_keeps_the_statistics_when_reverted() -> None:
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(2)).double(), "sync_bn")
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(normswap.revert(model)[0], images(9))
