"""The passes on the processor over contiguous maps: a row of positions for every channel.

They are torch's own vectorised loops, used on other shapes than they were written for. Which
serves best was measured, with one thread, in float32; the benchmark of the norms has the outcome.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normswap.norms.passes import plain
from normswap.norms.passes.native import batch_norm_sums
from normswap.norms.passes.plain import two_pass
from normswap.norms.passes.shapes import beside, work_dtype

__all__ = ["channel_sums", "combined", "moments", "scaled"]

#: Group norm's variance is off by about 1e-7 relative for every deviation that the mean is from
#: zero: beyond ten deviations rows are measured again.
FAR = 1e2


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions."""
    rows = x.reshape(-1, math.prod(x.shape[2:]))
    mean, var = _of_rows(rows)
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset as batch norm in eval mode, with a channel for each row."""
    count = gain.numel()
    scale, add = gain.reshape(-1), offset.reshape(-1)
    zero, one = scale.new_zeros(count), scale.new_ones(count)
    rows = x.reshape(1, count, -1)
    y = torch.native_batch_norm(rows, scale, add, zero, one, False, 0.0, 0.0)[0]
    # A plain view could not be overwritten by what comes next, such as a ReLU in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
    return shaped


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy."""
    shape = (1, mean.numel(), -1)
    return batch_norm_sums(dy.reshape(shape), x.reshape(shape), mean)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift."""
    if x.dtype == gain.dtype:
        return scaled(dy, gain, shift).addcmul_(x, beside(slope, x))
    return plain.combined(dy, x, gain, slope, shift)


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm with a group for each row tells mean and 1/deviation.

    With eps 0 the deviation of a constant row is infinite, which is right here, as its output
    is not used.
    """
    count, length = rows.shape
    one = None if rows.dtype == work_dtype(rows) else rows.new_ones(count, dtype=torch.float32)
    _, mean, rstd = torch.native_group_norm(
        rows.view(1, count, length), one, one, 1, count, length, count, 0.0
    )
    mean, var = mean.view(-1), rstd.view(-1).reciprocal_().square_()
    far = (mean.square() > FAR * var).nonzero().squeeze(1)
    if len(far):
        mean[far], var[far] = two_pass(rows[far].to(mean.dtype), 1)
    return mean, var
