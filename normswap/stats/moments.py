"""Mean and variance of one batch per channel, as exactly as its precision allows."""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.stats.accumulate import precise

__all__ = ["FAR", "channel_moments", "refined"]

#: Beyond this many standard deviations from zero, a mean rounded to single precision costs the
#: variance more than rounding errors of its own: (1e3 · 1e-7)² = 1e-8 is still below them.
FAR = 1e3
#: As many are summed in the precision of the data, or single precision; the sums in double.
VALUES = 512


def channel_moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel, (C,) each, in double precision.

    Args:
        x: an input; of a single value per channel the variance is zero.
        channel_dim: where its channels are.
    """
    return refined(x, channel_dim, *_one_pass(x, channel_dim))


def refined(x: Tensor, channel_dim: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance that were measured in one pass, measured again where that was too coarse.

    Args:
        x: what they were measured of.
        channel_dim: where its channels are.
        mean: (C,), in double precision.
        var: unbiased, (C,), likewise.
    """
    if x.dtype == torch.float64 or not bool((mean.square() > FAR**2 * var).any()):
        return mean, var
    offset = mean.to(torch.float32)
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    # What is near its mean differs from it by an exact amount, and those differences are small.
    rest, var = _one_pass(x - offset.view(shape), channel_dim)
    return precise(offset) + rest, var


def _one_pass(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    x = x.movedim(channel_dim, 1)
    values = x.numel() // x.shape[1]
    parts = torch.split(x, max(1, VALUES * x.shape[0] // values))
    means, spreads = zip(*map(_mean_and_spread, parts), strict=True)
    mean, spread = torch.stack(means), torch.stack(spreads)
    weight = mean.new_tensor([[part.shape[0]] for part in parts]) * (values / x.shape[0])
    whole = (weight * mean).sum(0) / values
    return whole, (spread + weight * (mean - whole).square()).sum(0) / max(values - 1, 1)


def _mean_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared deviations from it, of a part that is short enough to be summed."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    if x.numel() == x.shape[1]:
        return precise(x.reshape(-1)), precise(var)
    torch.batch_norm_update_stats(x, mean, var, 1.0)
    return precise(mean), precise(var) * (x.numel() // x.shape[1] - 1)
