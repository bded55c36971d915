"""What a pool is expected to measure, from the statistics of the channels alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from normswap.norms.pool import BATCH, POSITION, RUNNING, Pool, per_group
from tests.reference.data import close, values

CHANNELS = 6
MEAN = values(CHANNELS, seed=1)
VAR = values(CHANNELS, seed=2).abs() + 0.2


def two_points() -> Tensor:
    """Channels (2, C) that are mean ± deviation, each as often: of mean MEAN, variance VAR."""
    return torch.stack([MEAN - VAR.sqrt(), MEAN + VAR.sqrt()])


def moments(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim, keepdim=True)
    return mean.squeeze(dim), ((x - mean) ** 2).mean(dim)


@pytest.mark.parametrize("channels", [1, 2, 3, CHANNELS])
def test_a_group_is_a_mixture_of_its_channels(channels: int) -> None:
    """Both points of every channel stand for a long sample of it."""
    mixed = two_points().T.reshape(CHANNELS // channels, -1)
    mean, var = moments(mixed, 1)
    expected_mean, expected_var = per_group(channels).expected(MEAN, VAR)
    close(expected_mean, mean.repeat_interleave(channels))
    close(expected_var, var.repeat_interleave(channels))


def test_a_position_is_one_draw_of_every_channel() -> None:
    """All 2^C draws of independent channels, each as likely, give the expectation exactly."""
    points = two_points()
    draws = torch.stack(
        [points[list(choice), range(CHANNELS)] for choice in product((0, 1), repeat=CHANNELS)]
    )
    mean, var = moments(draws, 1)
    expected_mean, expected_var = POSITION.expected(MEAN, VAR)
    close(expected_mean, mean.mean().expand(CHANNELS))
    close(expected_var, var.mean().expand(CHANNELS))


@pytest.mark.parametrize("channels", [1, 2, 3, CHANNELS])
def test_without_a_mean_a_group_measures_the_mean_square(channels: int) -> None:
    square = (two_points() ** 2).T.reshape(CHANNELS // channels, -1).mean(1)
    expected_mean, expected_var = per_group(channels, centred=False).expected(MEAN, VAR)
    close(expected_mean, torch.zeros(CHANNELS).double())
    close(expected_var, square.repeat_interleave(channels))


def test_without_a_mean_a_position_measures_the_mean_square() -> None:
    expected_mean, expected_var = Pool("position", centred=False).expected(MEAN, VAR)
    close(expected_mean, torch.zeros(CHANNELS).double())
    close(expected_var, (two_points() ** 2).mean().expand(CHANNELS))


@pytest.mark.parametrize("pool", [BATCH, RUNNING])
def test_pools_of_single_channels_measure_the_channels_own(pool: Pool) -> None:
    mean, var = pool.expected(MEAN, VAR)
    assert torch.equal(mean, MEAN)
    assert torch.equal(var, VAR)


def test_how_many_values_share_a_statistic() -> None:
    assert BATCH.values(4, CHANNELS, 10) == 40
    assert per_group(3).values(4, CHANNELS, 10) == 30
    assert POSITION.values(4, CHANNELS, 10) == CHANNELS
