"""timm's norms that carry a dropout and an activation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from tests.reference import formulas
from tests.reference.footprint import footprint
from tests.reference.ranks import lone_rank
from tests.stats.models import assert_keeps_all_of, cut, images

timm = pytest.importorskip("timm", minversion="1.0")


def norm_with_activation() -> nn.Module:
    return timm.layers.BatchNormAct2d(2).double()


def sync_norm_with_activation() -> nn.Module:
    return timm.layers.convert_sync_batchnorm(norm_with_activation())


@pytest.mark.parametrize("make", [norm_with_activation, sync_norm_with_activation])
def test_a_norm_with_an_activation_keeps_what_came_in(make: Callable[[], nn.Module]) -> None:
    model = make()
    normswap.warmup(model, cut(images(9), [4, 5]))
    assert_keeps_all_of(model, images(9))


def test_a_sync_norms_activation_runs_in_a_group_too(tmp_path: Path) -> None:
    model = nn.Sequential(sync_norm_with_activation(), nn.BatchNorm2d(2).double())
    with lone_rank(tmp_path):
        normswap.warmup(model, [images(9)])
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    assert_keeps_all_of(model[1], formulas.batch_norm(images(9), one, zero).clamp(min=0))


def test_its_fused_dropout_is_off() -> None:
    first = timm.layers.BatchNormAct2d(2, apply_act=False, drop_layer=nn.Dropout)
    assert isinstance(first.drop, nn.Dropout)
    first.drop.p = 0.9
    model = nn.Sequential(first, nn.BatchNorm2d(2)).double()
    normswap.warmup(model, [images(9)])
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    assert_keeps_all_of(model[1], formulas.batch_norm(images(9), one, zero))


def test_nothing_of_it_changes_but_its_statistics() -> None:
    model = timm.layers.BatchNormAct2d(2).double()
    before = footprint(model)
    normswap.warmup(model, [images(9)])
    after = footprint(model)
    assert {key for key in before if after[key] != before[key]} == {"._buffers"}
    assert after.keys() == before.keys()


def test_a_whole_model_is_warmed_up() -> None:
    model = timm.create_model("test_efficientnet", num_classes=3).double()
    data = [images(4).repeat(1, 2, 8, 8)[:, :3] for _ in range(2)]
    report = normswap.warmup(model, data)
    assert len(report.estimated) == len(report) == len(normswap.find(model))
