"""Mean and variance of one batch per channel, as exactly as its precision allows."""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.stats.accumulate import precise

__all__ = ["FAR", "channel_moments", "refined"]

#: Beyond this many standard deviations from zero, sums in single precision and in double cost
#: the variance more than the rounding of the data itself; and sums of squares.
FAR, FAR_IN_DOUBLE, FAR_FOR_SQUARES = 10.0, 1e3, 3.0
#: As many values of a channel are summed in single precision; the sums in double.
VALUES = 4096
#: As many values are measured at once: what is computed beside them fits in a cache.
CHUNK = 2**19


def channel_moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel, (C,) each, in double precision.

    Args:
        x: an input; of a single value per channel the variance is zero.
        channel_dim: where its channels are.
    """
    maps = x if channel_dim == 1 else x.movedim(channel_dim, 1)
    if maps.ndim > 2 and maps.is_contiguous():
        mean, var = _of_squares(maps)
        if not _beyond(FAR_FOR_SQUARES, mean, var):
            return mean, var
    return refined(x, channel_dim, *_one_pass(x, channel_dim), far=FAR)


def refined(
    x: Tensor, channel_dim: int, mean: Tensor, var: Tensor, *, far: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance that were measured in one pass, measured again where that was too coarse.

    Args:
        x: what they were measured of.
        channel_dim: where its channels are.
        mean: (C,), in double precision.
        var: unbiased, (C,), likewise.
        far: how many standard deviations from zero the measurement held out.
    """
    if x.dtype == torch.float64 or not _beyond(far, mean, var):
        return mean, var
    offset = mean.to(x.device, torch.float32)
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    # What is near its mean differs from it by an exact amount, and those differences are small.
    rest, var = _one_pass(x - offset.view(shape), channel_dim)
    return precise(offset) + rest, var


def _beyond(far: float, mean: Tensor, var: Tensor) -> bool:
    return bool((mean.square() > far**2 * var).any())


def _of_squares(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (C,) of (N, C, ...), by the fastest two reductions there are."""
    rows = maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(2)
    values = len(rows) * rows.shape[2]
    parts = torch.split(rows, VALUES, 2)
    mean = precise(rows.sum(2)).sum(0) / values
    lengths = [precise(torch.linalg.vector_norm(part, dim=2)) for part in parts]
    square = sum(length.square_().sum(0) for length in lengths) / values
    return mean, (square - mean.square()).mul_(values / max(values - 1, 1)).clamp_(min=0)


def _one_pass(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    rows = x.movedim(channel_dim, -1)
    values = x.numel() // rows.shape[-1]
    if rows.is_contiguous():
        parts = torch.split(rows.reshape(values, -1), VALUES)
        measured = [_of_rows(part) for part in parts]
        counts = [len(part) for part in parts]
    else:
        maps = x.movedim(channel_dim, 1)
        parts = torch.split(maps, max(1, CHUNK * len(maps) // maps.numel()))
        measured = [_of_maps(part) for part in parts]
        counts = [maps[0, 0].numel()] * len(maps)
    means, variances = (precise(torch.cat(each)) for each in zip(*measured, strict=True))
    weight = means.new_tensor(counts)[:, None]
    mean = (weight * means).sum(0) / values
    spread = (weight * (variances + (means - mean).square())).sum(0)
    return mean, spread / max(values - 1, 1)


def _of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (1, C) of (R, C), as tokens and channels-last maps are."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, 1, x.shape[1], dtype=dtype, device=x.device)
    if len(x) == 1:
        return x.to(dtype), var
    torch.batch_norm_update_stats(x, mean[0], var[0], 1.0)
    return mean, var * (1 - 1 / len(x))


def _of_maps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of each map of (N, C, ...)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    samples, channels = x.shape[:2]
    values = x[0, 0].numel()
    # The fastest that torch has for this: it writes a normalized output too, which is thrown away.
    _, mean, rstd = torch.native_group_norm(x, None, None, samples, channels, values, channels, 0.0)
    return mean, rstd.reciprocal().square()
