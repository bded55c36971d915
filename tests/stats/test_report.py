"""What a warm-up tells of itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from tests.stats.models import cut, images, net


def test_every_norm_has_a_row() -> None:
    model = net()
    model[5].eval()
    report = normswap.warmup(model, cut(images(6), [4, 2]))
    assert sorted(row.path for row in report) == ["1", "5"]
    assert [row.path for row in report.estimated] == ["1"]
    assert [row.path for row in report.left] == ["5"]


def test_calls_batches_and_samples_are_counted() -> None:
    shared = nn.BatchNorm2d(2).double()
    report = normswap.warmup(nn.Sequential(shared, shared), cut(images(6), [4, 2]))
    assert (report.batches, report.samples, report.skipped) == (2, 6, 0)
    assert report[0].calls == 4
    assert report.seconds > 0


@pytest.mark.parametrize("method", ["pooled", "average", "ema"])
def test_the_method_is_named(method: str) -> None:
    report = normswap.warmup(net(), [images(6)], method=method)
    assert report.method == method
    assert method in str(report)


def test_the_shift_is_in_new_deviations() -> None:
    norm = nn.BatchNorm2d(2).double()
    data = images(50)
    (row,) = normswap.warmup(norm, [data])
    mean, var = data.mean((0, 2, 3)), data.transpose(0, 1).flatten(1).var(1)
    assert row.mean_shift == pytest.approx((mean.square() / var).mean().sqrt().item())
    assert row.var_ratio == pytest.approx(var.log().mean().exp().item())


def test_a_second_pass_over_the_same_data_moves_nothing() -> None:
    norm = nn.BatchNorm2d(2).double()
    normswap.warmup(norm, [images(6)])
    (row,) = normswap.warmup(norm, [images(6)])
    assert row.mean_shift == pytest.approx(0, abs=1e-12)
    assert row.var_ratio == pytest.approx(1)


def test_a_variance_of_zero_is_no_obstacle() -> None:
    (row,) = normswap.warmup(nn.BatchNorm2d(2), [torch.ones(4, 2, 3, 3)])
    assert row.status == "estimated"


def test_it_prints_paths_reasons_and_skipped_batches() -> None:
    model = net()
    model[5].eval()
    spoilt = images(4) * float("nan")
    printed = str(normswap.warmup(model, [images(6), spoilt], on_nonfinite="skip"))
    for text in ("estimated", "frozen", "6 samples", "1 batches skipped"):
        assert text in printed


def test_a_norm_that_is_the_model_is_named_in_words() -> None:
    assert "the model itself" in str(normswap.warmup(nn.BatchNorm2d(2).double(), [images(6)]))
