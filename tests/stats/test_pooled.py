"""``method="pooled"``: exact mean and total variance of everything that was seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import StatisticsError
from tests.reference import formulas
from tests.reference.data import close, fill, values
from tests.stats.models import (
    CHANNELS,
    assert_keeps,
    assert_keeps_all_of,
    cut,
    images,
    kept,
    net,
    one_norm,
)

SAMPLES = 70
CUTS = {
    "all in one": [SAMPLES],
    "ones": [1] * SAMPLES,
    "sevens": [7] * 10,
    "sixty-four and the rest": [64, 6],
    "ragged": [1, 30, 2, 36, 1],
}
each_cut = pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())


@each_cut
def test_the_first_norm_keeps_exact_statistics_whatever_the_cut(sizes: list[int]) -> None:
    model, data = one_norm(), images(SAMPLES)
    normswap.warmup(model, cut(data, sizes))
    assert_keeps_all_of(model[1], model[0](data))


@each_cut
def test_batches_of_a_single_value_count(sizes: list[int]) -> None:
    norm, data = nn.BatchNorm1d(CHANNELS).double(), values(SAMPLES, CHANNELS)
    normswap.warmup(norm, cut(data, sizes))
    assert_keeps_all_of(norm, data)


@each_cut
def test_the_order_of_batches_does_not_matter(sizes: list[int]) -> None:
    data = cut(images(SAMPLES), sizes)
    forth, back = one_norm(), one_norm()
    normswap.warmup(forth, data)
    normswap.warmup(back, data[::-1])
    assert_keeps(forth[1], *kept(back[1]))


def test_a_later_norm_is_fed_by_norms_that_use_their_batch() -> None:
    model, data = net(), cut(images(12), [5, 4, 3])
    normswap.warmup(model, data)
    inputs = [
        model[4](formulas.batch_norm(model[0](x), model[1].weight, model[1].bias).clamp(min=0))
        for x in data
    ]
    assert_keeps_all_of(model[5], torch.cat(inputs))


def test_earlier_statistics_do_not_matter() -> None:
    model, data = one_norm(), images(9)
    model[1].running_mean.fill_(1e6)
    model[1].running_var.fill_(1e-6)
    normswap.warmup(model, cut(data, [4, 5]))
    assert_keeps_all_of(model[1], model[0](data))


@each_cut
def test_the_batches_seen_are_counted(sizes: list[int]) -> None:
    model = net()
    model[1].num_batches_tracked.fill_(123)
    normswap.warmup(model, cut(images(SAMPLES), sizes))
    assert model[1].num_batches_tracked == model[5].num_batches_tracked == len(sizes)


def test_the_next_batch_without_momentum_weighs_as_one_of_those_seen() -> None:
    model, data = one_norm(), cut(images(20), [4] * 5)
    model[1].momentum = None
    normswap.warmup(model, data[:4])
    (mean, var), newest = kept(model[1]), formulas.mean_and_unbiased_var(model[0](data[4]))
    model(data[4])
    assert_keeps(model[1], mean + (newest[0] - mean) / 5, var + (newest[1] - var) / 5)


def test_a_norm_that_is_called_twice_pools_both_calls() -> None:
    norm, data = nn.BatchNorm2d(2).double(), images(10)
    doubled = nn.Sequential(norm, nn.Conv2d(2, 2, 1).double(), norm)
    normswap.warmup(doubled, cut(data, [6, 4]))
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    second = [doubled[1](formulas.batch_norm(x, one, zero)) for x in cut(data, [6, 4])]
    assert_keeps_all_of(norm, torch.cat([data, *second]))
    assert norm.num_batches_tracked == 4


def test_a_single_value_in_all_is_refused() -> None:
    norm = nn.BatchNorm1d(CHANNELS).double()
    with pytest.raises(StatisticsError, match="saw 1 values per channel"):
        normswap.warmup(norm, [values(1, CHANNELS)])


def test_the_refusal_names_the_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(CHANNELS)).double()
    with pytest.raises(StatisticsError, match=r"1 \(BatchNorm1d\)"):
        normswap.warmup(model, [values(1, CHANNELS)])


def test_a_batch_of_a_single_value_passes_on_what_training_would() -> None:
    """Its own mean taken off leaves the bias, whatever was kept before."""
    first, second = fill(nn.BatchNorm1d(CHANNELS)), nn.BatchNorm1d(CHANNELS).double()
    data = values(5, CHANNELS)
    normswap.warmup(nn.Sequential(first, second), cut(data, [1, 4]))
    alone = first.bias.detach().expand(1, -1)
    others = formulas.batch_norm(data[1:], first.weight, first.bias)
    assert_keeps_all_of(second, torch.cat([alone, others]))


def test_an_empty_batch_changes_nothing() -> None:
    model, data = one_norm(), images(8)
    normswap.warmup(model, [data[:3], data[:0], data[3:]])
    assert_keeps_all_of(model[1], model[0](data))
    assert model[1].num_batches_tracked == 2


def test_samples_of_an_instance_norm_weigh_the_same_whatever_the_cut() -> None:
    norm, data = nn.InstanceNorm2d(2, track_running_stats=True).double(), images(11)
    normswap.warmup(norm, cut(data, [1, 8, 2]))
    close(norm.running_mean, data.mean((2, 3)).mean(0))
    close(norm.running_var, data.var((2, 3)).mean(0))


def test_a_dimension_of_maps_may_change_between_batches() -> None:
    norm, small, large = nn.BatchNorm2d(2).double(), values(3, 2, 2, 2), values(2, 2, 5, 4)
    normswap.warmup(norm, [small, large])
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in (small, large)], dim=1)
    assert_keeps_all_of(norm, flat.T)
