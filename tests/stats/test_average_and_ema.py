"""``method="average"``: the mean of the batches' statistics; ``"ema"``: what training keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import StatisticsError
from tests.reference import formulas
from tests.reference.data import close, values
from tests.stats.models import (
    CHANNELS,
    assert_keeps,
    cut,
    images,
    kept,
    net,
    one_norm,
    really_trained,
)

SIZES = [5, 2, 9, 4]


def test_the_average_is_over_batches_of_any_size() -> None:
    model, data = one_norm(), cut(images(20), SIZES)
    normswap.warmup(model, data, method="average")
    statistics = [formulas.mean_and_unbiased_var(model[0](x)) for x in data]
    means, variances = map(torch.stack, zip(*statistics, strict=True))
    assert_keeps(model[1], means.mean(0), variances.mean(0))


def test_the_average_counts_its_batches() -> None:
    model = one_norm()
    normswap.warmup(model, cut(images(20), SIZES), method="average")
    assert model[1].num_batches_tracked == len(SIZES)


def test_the_average_leaves_out_batches_of_a_single_value() -> None:
    norm, data = nn.BatchNorm1d(CHANNELS).double(), values(9, CHANNELS)
    normswap.warmup(norm, cut(data, [1, 8]), method="average")
    assert_keeps(norm, *formulas.mean_and_unbiased_var(data[1:]))


@pytest.mark.parametrize("method", ["average", "ema"])
def test_batches_of_single_values_alone_are_refused(method: str) -> None:
    norm = nn.BatchNorm1d(CHANNELS).double()
    with pytest.raises(StatisticsError, match="no batch of two or more values"):
        normswap.warmup(norm, cut(values(3, CHANNELS), [1] * 3), method=method)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("already_seen", [0, 3])
def test_ema_is_what_training_writes(momentum: float | None, already_seen: int) -> None:
    model = net()
    for norm in (model[1], model[5]):
        norm.momentum = momentum
    model = really_trained(model, cut(images(already_seen * 4, seed=9), [4] * already_seen))
    data = cut(images(20), SIZES)
    expected = really_trained(model, data)
    normswap.warmup(model, data, method="ema")
    for index in (1, 5):
        assert_keeps(model[index], *kept(expected[index]))
        assert model[index].num_batches_tracked == expected[index].num_batches_tracked


def test_ema_of_a_norm_that_is_called_twice_is_what_training_writes() -> None:
    norm = nn.BatchNorm2d(2).double()
    model = nn.Sequential(norm, nn.Conv2d(2, 2, 1).double(), norm)
    data = cut(images(9), [5, 4])
    expected = really_trained(model, data)
    normswap.warmup(model, data, method="ema")
    assert_keeps(norm, *kept(expected[0]))
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_ema_of_an_instance_norm_is_what_training_writes(momentum: float) -> None:
    norm = nn.InstanceNorm2d(2, track_running_stats=True, momentum=momentum).double()
    data = cut(images(9), [5, 4])
    expected = really_trained(norm, data)
    normswap.warmup(norm, data, method="ema")
    assert_keeps(norm, *kept(expected))


def test_average_of_an_instance_norm_is_over_batches() -> None:
    norm, data = nn.InstanceNorm2d(2, track_running_stats=True).double(), cut(images(9), [5, 4])
    normswap.warmup(norm, data, method="average")
    close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0))


def test_ema_without_counter_is_what_training_writes() -> None:
    norm = nn.BatchNorm2d(2).double()
    norm.num_batches_tracked = None
    data = cut(images(9), [5, 4])
    expected = really_trained(norm, data)
    normswap.warmup(norm, data, method="ema")
    assert_keeps(norm, *kept(expected))
