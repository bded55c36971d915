"""The four passes over a map that all norms of per-channel statistics are made of.

Each takes (N, C, *) and (N, C): mean and variance of every sample's channel, y = gain·x + offset,
the two sums that backward needs, and dx = gain·dy + slope·x + shift. On the processor they are
torch's own vectorised loops, used on other shapes than they were written for: a sample's channel
as a channel, or as a row. Which serves best was measured, with one thread, in float32; the
benchmark of the norms has the outcome.

Statistics are float32, or float64 for a float64 input, and never E[x²] - E[x]² of raw data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["beside", "channel_sums", "combined", "matching", "moments", "scaled", "work_dtype"]

#: Rows shorter than this are no gain over plain operations.
SHORT_ROW = 16

#: From here on torch's group norm measures rows faster than three plain passes.
LONG_ROW = 400

#: Group norm's variance is off by 1e-8 relative for every deviation that the mean is from zero:
#: beyond a hundred deviations rows are measured again.
FAR = 1e4

#: Samples of at least this many values are worth a call each where the channels come last.
LARGE_SAMPLE = 2**14


def work_dtype(x: Tensor) -> torch.dtype:
    """What the statistics of an input are: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions of every sample's channel, two tensors (N, C).

    Args:
        x: (N, C, *), floating point.
    """
    if x.numel() == 0:
        none = x.new_zeros(x.shape[:2], dtype=work_dtype(x))
        return none, none.clone()
    layout = _layout(x)
    if layout == "rows":
        rows = x.reshape(-1, math.prod(x.shape[2:]))
        measure = _of_long_rows if rows.shape[1] >= LONG_ROW else _of_rows
        mean, var = measure(rows)
        return mean.view(x.shape[:2]), var.view(x.shape[:2])
    if layout == "columns":
        return _of_columns(x)
    values = _positions_last(x).to(work_dtype(x))
    return _two_pass(values, -1)


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset, in the dtype and memory format of x.

    Args:
        x: (N, C, *).
        gain: (N, C), of `work_dtype`.
        offset: (N, C), likewise.
    """
    layout = _layout(x)
    if layout == "rows":
        return _scaled_rows(x, gain, offset)
    if layout == "columns" and x.dtype == gain.dtype:
        # The channels go along: the innermost loop is over contiguous memory in all three.
        return torch.addcmul(beside(offset, x), x, beside(gain, x))
    return (x * beside(gain, x)).add_(beside(offset, x)).to(x.dtype)


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy over the positions, two tensors (N, C) of `work_dtype`.

    Args:
        dy: (N, C, *), of the dtype of x.
        x: (N, C, *).
        mean: (N, C), of `work_dtype`.
    """
    layout = _layout(x)
    if layout == "rows":
        shape = (1, mean.numel(), -1)
        return _batch_norm_sums(dy.reshape(shape), x.reshape(shape), mean)
    if layout == "columns":
        if x[0].numel() >= LARGE_SAMPLE:
            parts = [_batch_norm_sums(dy[n : n + 1], x[n : n + 1], mean[n]) for n in range(len(x))]
            products, sums = (torch.stack(part) for part in zip(*parts, strict=True))
            return products, sums
        columns, over = _columns(x), _columns(dy).to(mean.dtype)
        return _summed((columns - mean[:, None]).mul_(over)), _summed(over)
    values = _positions_last(dy).to(mean.dtype)
    centred = _positions_last(x) - mean[..., None]
    return (values * centred).sum(-1), values.sum(-1)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift, in the dtype and memory format of x.

    Args:
        dy: (N, C, *), of the dtype of x.
        x: (N, C, *).
        gain: (N, C), of `work_dtype`, as are the next two.
        slope: (N, C).
        shift: (N, C).
    """
    layout = _layout(x)
    same = x.dtype == gain.dtype
    if layout == "rows" and same and x[0, 0].numel() >= LONG_ROW:
        return _scaled_rows(dy, gain, shift).addcmul_(x, beside(slope, x))
    if layout == "columns" and same:
        with_x = torch.addcmul(beside(shift, x), x, beside(slope, x))
        return with_x.addcmul_(dy, beside(gain, x))
    total = (dy * beside(gain, x)).addcmul_(x.to(gain.dtype), beside(slope, x))
    return total.add_(beside(shift, x)).to(x.dtype)


def matching(dy: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype and memory format of the input that it belongs to."""
    dy = dy.to(x.dtype)
    if dy.stride() == x.stride():
        return dy
    if _layout(x) == "columns":
        return dy.movedim(1, -1).contiguous().movedim(-1, 1)
    return dy.contiguous()


def _layout(x: Tensor) -> str:
    """How a map lies in memory: by ``"rows"`` of positions or by ``"columns"`` of channels.

    Empty, where plain operations are best: on accelerators, on few positions, on other strides.
    """
    if x.device.type != "cpu" or x.numel() == 0 or x[0, 0].numel() < SHORT_ROW:
        return ""
    if x.is_contiguous():
        return "rows"
    return "columns" if x.movedim(1, -1).is_contiguous() else ""


def _positions_last(x: Tensor) -> Tensor:
    """(N, C, *) as (N, C, L)."""
    return x[..., None] if x.ndim == 2 else x.flatten(2)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """(N, C) with ones behind, as many as the map has dimensions of positions."""
    return values.view(*values.shape, *[1] * (x.ndim - 2))


def _columns(x: Tensor) -> Tensor:
    """(N, C, *) whose channels come last in memory as (N, L, C)."""
    return x.movedim(1, -1).flatten(1, -2)


def _two_pass(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, corrected for what the mean was rounded by."""
    near = values.mean(dim, keepdim=True)
    centred = values - near
    off = centred.mean(dim)
    var = centred.square().mean(dim) - off.square()
    return near.squeeze(dim) + off, var.clamp_(min=0)


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `_two_pass`, for a few hundred positions: sums and root sums of squares are fast."""
    length = rows.shape[1]
    values = rows.to(work_dtype(rows))
    near = values.sum(1).div_(length)
    centred = values - near[:, None]
    off = centred.sum(1).div_(length)
    square = torch.linalg.vector_norm(centred, dim=1).square_().div_(length)
    return near.add_(off), square.sub_(off.square_()).clamp_(min=0)


def _of_long_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
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
        mean[far], var[far] = _two_pass(rows[far].to(mean.dtype), 1)
    return mean, var


def _of_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance where the channels come last."""
    values = _columns(x).to(work_dtype(x))
    length = values.shape[1]
    near = _summed(values).div_(length)
    centred = values - near[:, None]
    off = _summed(centred).div_(length)
    square = _summed(centred.square_()).div_(length)
    return near + off, square.sub_(off.square()).clamp_(min=0)


def _summed(columns: Tensor) -> Tensor:
    """(N, L, C) summed over L: a product with ones is fastest, and not to be cast for speed."""
    ones = columns.new_ones(1, 1, 1).expand(len(columns), 1, columns.shape[1])
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(ones, columns).squeeze(1)


def _scaled_rows(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset as batch norm in eval mode, with a channel for each row."""
    count = gain.numel()
    scale, add = gain.reshape(-1), offset.reshape(-1)
    zero, one = scale.new_zeros(count), scale.new_ones(count)
    rows = x.reshape(1, count, -1)
    y = torch.native_batch_norm(rows, scale, add, zero, one, False, 0.0, 0.0)[0]
    # A plain view could not be overwritten by what comes next, such as a ReLU in place.
    shaped: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
    return shaped


def _batch_norm_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy per channel, which is batch norm's backward for a unit gain."""
    one, centre = mean.new_ones(mean.numel()), mean.reshape(-1)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, centre, one, centre, one, True, 0.0, [False, True, True]
    )
    return products.view(mean.shape), sums.view(mean.shape)
