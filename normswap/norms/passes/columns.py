"""The passes on the processor over maps whose channels come last in memory.

What is elementwise lets the channels go along, so that the innermost loop is over contiguous
memory; what is summed over the positions is a product of matrices, or torch's own batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.norms.passes import plain
from normswap.norms.passes.native import batch_norm_sums
from normswap.norms.passes.shapes import beside, work_dtype

__all__ = ["channel_sums", "combined", "moments", "scaled"]

#: Samples of at least this many values are worth a call each.
LARGE_SAMPLE = 2**14


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions."""
    values = _columns(x).to(work_dtype(x))
    length = values.shape[1]
    near = _summed(values).div_(length)
    centred = values - near[:, None]
    off = _summed(centred).div_(length)
    square = _summed(centred.square_()).div_(length)
    return near + off, square.sub_(off.square()).clamp_(min=0)


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset."""
    if x.dtype == gain.dtype:
        return torch.addcmul(beside(offset, x), x, beside(gain, x))
    return plain.scaled(x, gain, offset)


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy."""
    if x[0].numel() >= LARGE_SAMPLE:
        parts = [batch_norm_sums(dy[n : n + 1], x[n : n + 1], mean[n]) for n in range(len(x))]
        products, sums = (torch.stack(part) for part in zip(*parts, strict=True))
        return products, sums
    columns, over = _columns(x), _columns(dy).to(mean.dtype)
    return _summed((columns - mean[:, None]).mul_(over)), _summed(over)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift."""
    if x.dtype == gain.dtype:
        with_x = torch.addcmul(beside(shift, x), x, beside(slope, x))
        return with_x.addcmul_(dy, beside(gain, x))
    return plain.combined(dy, x, gain, slope, shift)


def _columns(x: Tensor) -> Tensor:
    """(N, C, *) as (N, L, C)."""
    return x.movedim(1, -1).flatten(1, -2)


def _summed(columns: Tensor) -> Tensor:
    """(N, L, C) summed over L: a product with ones is fastest, and not to be cast for speed."""
    ones = columns.new_ones(1, 1, 1).expand(len(columns), 1, columns.shape[1])
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(ones, columns).squeeze(1)
