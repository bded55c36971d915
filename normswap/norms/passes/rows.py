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
from normswap.norms.passes.row_moments import row_moments
from normswap.norms.passes.shapes import beside

__all__ = ["channel_sums", "combined", "moments", "scaled"]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions."""
    mean, var = row_moments(x.reshape(-1, math.prod(x.shape[2:])))
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
