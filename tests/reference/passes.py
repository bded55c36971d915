"""The passes over (N, C, *) as sums over all positions, in double precision."""

from __future__ import annotations

from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """(N, C, L)."""
    return x.double().reshape(x.shape[0], x.shape[1], x[0, 0].numel())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = flat(x)
    mean = rows.sum(2) / rows.shape[2]
    return mean, ((rows - mean[:, :, None]) ** 2).sum(2) / rows.shape[2]


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return (gain.double()[:, :, None] * flat(x) + offset.double()[:, :, None]).reshape(x.shape)


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    slopes = flat(dy)
    return (slopes * (flat(x) - mean.double()[:, :, None])).sum(2), slopes.sum(2)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    return scaled(dy, gain, shift) + scaled(x, slope, shift * 0)
