"""Fits of one signal to another, from sums that can be merged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from normswap.stats.calibration import joint
from normswap.stats.calibration.joint import Joint
from tests.reference.calibration import columns, equal_moments, least_squares
from tests.reference.data import close, values

CHANNELS = 3
GAIN = torch.ones(CHANNELS)


def signals(samples: int = 12) -> tuple[Tensor, Tensor]:
    """One signal, and another that has some of it in it, with a negative gain in one channel."""
    z = values(samples, CHANNELS, 5, 2)
    gains = torch.tensor([2.0, -0.7, 0.1]).view(1, -1, 1, 1)
    return z, gains * z + values(*z.shape, seed=1) + 3


def joint_of(z: Tensor, y: Tensor, sizes: Sequence[int], channel_dim: int = 1) -> Joint:
    seen = Joint(z.shape[channel_dim], z.device)
    for parts in zip(z.split(list(sizes)), y.split(list(sizes)), strict=True):
        seen.see(*parts, channel_dim)
    return seen


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [7, 0, 5], [2, 9, 1]])
@pytest.mark.parametrize("offset", [True, False])
def test_least_squares_however_the_data_is_cut(sizes: list[int], offset: bool) -> None:
    z, y = signals()
    found = joint_of(z, y, sizes).fit("least_squares", GAIN, offset=offset)
    expected = least_squares(columns(z, 1), columns(y, 1), offset=offset)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [2, 9, 1]])
def test_equal_moments_however_the_data_is_cut(sizes: list[int]) -> None:
    z, y = signals()
    found = joint_of(z, y, sizes).fit("moments", GAIN, offset=True)
    for one, other in zip(found, equal_moments(columns(z, 1), columns(y, 1)), strict=True):
        close(one, other)


def test_equal_moments_keep_the_sign_of_the_gain_so_far() -> None:
    z, y = signals()
    gain, offset = joint_of(z, y, [12]).fit("moments", torch.tensor([1.0, -2.0, 0.0]), offset=True)
    assert gain.sign().tolist() == [1, -1, 1]
    fitted = gain[:, None] * columns(z, 1) + offset[:, None]
    close(fitted.mean(1), columns(y, 1).mean(1))
    close(fitted.std(1), columns(y, 1).std(1))


def test_equal_moments_without_an_offset_are_equal_mean_squares() -> None:
    z, y = signals()
    gain, offset = joint_of(z, y, [12]).fit("moments", GAIN, offset=False)
    close((gain[:, None] * columns(z, 1)).square().mean(1), columns(y, 1).square().mean(1))
    assert not offset.any()


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_channels_may_be_anywhere(channel_dim: int) -> None:
    z, y = values(4, 6, 5), values(4, 6, 5, seed=1)
    found = joint_of(z, y, [4], channel_dim).fit(
        "least_squares", torch.ones(z.shape[channel_dim]), offset=True
    )
    expected = least_squares(columns(z, channel_dim), columns(y, channel_dim))
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_a_flat_signal_is_fitted_too() -> None:
    z, y = values(20, 3), values(20, 3, seed=1)
    found = joint_of(z, y, [13, 7]).fit("least_squares", GAIN, offset=True)
    for one, other in zip(found, least_squares(z.T, y.T), strict=True):
        close(one, other)


def test_merged_in_any_order() -> None:
    z, y = signals()
    parts = [joint_of(z[a:b], y[a:b], [b - a]) for a, b in ((0, 1), (1, 8), (8, 12))]
    nothing = Joint(CHANNELS, z.device)
    fits = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = Joint(CHANNELS, z.device)
        for part in (nothing, *(parts[i] for i in order), nothing):
            total.merge(part.weight, part.mean, part.spread)
        fits.append(total.fit("least_squares", GAIN, offset=True))
    expected = least_squares(columns(z, 1), columns(y, 1))
    for fit in fits:
        for one, other in zip(fit, expected, strict=True):
            close(one, other)


def test_long_batches_are_seen_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = signals()
    whole = joint_of(z, y, [12])
    monkeypatch.setattr(joint, "VALUES", 70)
    parts = joint_of(z, y, [12])
    close(parts.mean, whole.mean)
    close(parts.spread, whole.spread)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("method", ["least_squares", "moments"])
def test_where_there_is_nothing_to_scale_the_gain_stays(method: joint.Fit, offset: bool) -> None:
    z, y = signals()
    z[:, 1] = 0
    gain, shift = joint_of(z, y, [5, 7]).fit(method, torch.full((3,), 1.25), offset=offset)
    assert gain[1] == 1.25
    close(shift[1], columns(y, 1)[1].mean() if offset else torch.zeros(()).double())


def test_what_rounding_leaves_of_a_constant_is_not_scaled_up() -> None:
    z, y = signals()
    z[:, 1] = 0.3 + 1e-9 * values(12, 5, 2)
    gain, shift = joint_of(z, y, [5, 7]).fit("least_squares", torch.full((3,), 1.25), offset=True)
    assert gain[1] == 1.25
    torch.testing.assert_close(shift[1], y[:, 1].mean() - 1.25 * z[:, 1].mean())


def test_a_small_deviation_far_from_zero_is_told_exactly() -> None:
    z, y = signals()
    z = z * 1e-2 + 1e3
    gain, _ = joint_of(z, y, [1, 4, 7]).fit("least_squares", GAIN, offset=True)
    expected, _ = least_squares(columns(z - 1e3, 1), columns(y, 1))
    torch.testing.assert_close(gain, expected, rtol=1e-8, atol=0)
