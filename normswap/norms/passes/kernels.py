"""The programs of the passes for Triton: each goes over a part of the positions of some channels.

A map is seen as channels of so many positions, in samples that follow each other in memory: the
strides say whether a channel's positions or a position's channels lie together, and the shape of
the tile that a program takes at a time follows them. Offsets of tiles are 64 bits wide, and those
within a tile 32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
# Triton compiles what is annotated too, and knows no types but its own.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "channel_sums_kernel",
    "combined_kernel",
    "merge_kernel",
    "moments_kernel",
    "scaled_kernel",
]


@triton.jit
def _place(
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """What a program works on, parts of the same channels being neighbours.

    Returns the channels' numbers over all samples, which of them exist, the offset of the first
    one's first position, the offsets of a tile's values from its first, and the part: its first
    position and how many there are.
    """
    parts = tl.cdiv(length, part_length)
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0).to(tl.int64)
    sample = program // parts // blocks
    channel = program // parts % blocks * CHANNELS
    first = program % parts * part_length
    count = tl.minimum(part_length, length - first).to(tl.int32)
    origin = sample * channels * length + channel * channel_stride
    beside = tl.arange(0, CHANNELS)
    tile = beside[:, None] * channel_stride + tl.arange(0, POSITIONS)[None, :] * position_stride
    return (
        sample * channels + channel + beside,
        beside < channels - channel,
        origin,
        tile,
        first,
        count,
    )


@triton.jit
def _inside(exists, step, count, POSITIONS: tl.constexpr):
    """Which values of a tile there are."""
    return exists[:, None] & (step * POSITIONS + tl.arange(0, POSITIONS) < count)[None, :]


@triton.jit
def _chan(count, mean, square, total):
    """Mean and variance from those of parts: counts, means and sums of squared deviations.

    The parts are along the second dimension. Chan, Golub and LeVeque's rule, for all at once.
    """
    merged = tl.sum(mean * (count / total), 1)
    off = mean - merged[:, None]
    return merged, tl.sum(square + count * off * off, 1) / total


@triton.jit
def moments_kernel(
    x,
    mean,
    var,
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Mean and variance of a part, or of all positions; of parts, less the channel's first value.

    Every place of the tile keeps a mean and a sum of squared deviations by Welford's rule, of
    values less the channel's first, so that a large mean takes no digits.
    """
    series, exists, origin, tile, first, count = _place(
        channels, length, part_length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    work = mean.dtype.element_ty
    start = origin + tl.arange(0, CHANNELS) * channel_stride
    pivot = tl.load(x + start, mask=exists, other=0.0).to(work)
    near = tl.zeros((CHANNELS, POSITIONS), work)
    square = tl.zeros((CHANNELS, POSITIONS), work)
    for step in range(0, tl.cdiv(count, POSITIONS)):
        at = tile + (origin + (first + step * POSITIONS) * position_stride)
        inside = _inside(exists, step, count, POSITIONS)
        value = tl.load(x + at, mask=inside, other=0.0).to(work) - pivot[:, None]
        off = tl.where(inside, value - near, 0.0)
        near += off / (step + 1)
        square += off * (value - near)
    seen = (count - tl.arange(0, POSITIONS) + POSITIONS - 1) // POSITIONS
    merged, spread = _chan(seen.to(work)[None, :], near, square, count.to(work))
    if WHOLE:
        tl.store(mean + series, pivot + merged, mask=exists)
        tl.store(var + series, spread, mask=exists)
    else:
        place = series * tl.cdiv(length, part_length) + first // part_length
        tl.store(mean + place, merged, mask=exists)
        tl.store(var + place, spread, mask=exists)


@triton.jit
def merge_kernel(
    x,
    part_mean,
    part_var,
    mean,
    var,
    all_channels,
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Mean and variance of channels from what `moments_kernel` leaves of their parts."""
    parts = tl.cdiv(length, part_length)
    work = mean.dtype.element_ty
    series = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    exists = series < all_channels
    part = tl.arange(0, PARTS)
    inside = exists[:, None] & (part < parts)[None, :]
    place = series[:, None] * parts + part[None, :]
    near = tl.load(part_mean + place, mask=inside, other=0.0)
    spread = tl.load(part_var + place, mask=inside, other=0.0)
    left = length - part.to(tl.int64) * part_length
    count = tl.maximum(tl.minimum(left, part_length), 0).to(work)[None, :]
    merged, merged_var = _chan(count, near, count * spread, tl.sum(count))
    row = (series // channels) * channels * length + (series % channels) * channel_stride
    pivot = tl.load(x + row, mask=exists, other=0.0).to(work)
    tl.store(mean + series, pivot + merged, mask=exists)
    tl.store(var + series, merged_var, mask=exists)


@triton.jit
def channel_sums_kernel(
    x,
    dy,
    mean,
    products,
    sums,
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Σ dy·(x - mean) and Σ dy over a part of the positions."""
    series, exists, origin, tile, first, count = _place(
        channels, length, part_length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    work = mean.dtype.element_ty
    centre = tl.load(mean + series, mask=exists, other=0.0)[:, None]
    product = tl.zeros((CHANNELS, POSITIONS), work)
    total = tl.zeros((CHANNELS, POSITIONS), work)
    for step in range(0, tl.cdiv(count, POSITIONS)):
        at = tile + (origin + (first + step * POSITIONS) * position_stride)
        inside = _inside(exists, step, count, POSITIONS)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(work)
        product += slope * (tl.load(x + at, mask=inside, other=0.0).to(work) - centre)
        total += slope
    place = series * tl.cdiv(length, part_length) + first // part_length
    tl.store(products + place, tl.sum(product, 1), mask=exists)
    tl.store(sums + place, tl.sum(total, 1), mask=exists)


@triton.jit
def scaled_kernel(
    x,
    gain,
    offset,
    y,
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """gain·x + offset."""
    series, exists, origin, tile, first, count = _place(
        channels, length, part_length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    times = tl.load(gain + series, mask=exists, other=0.0)[:, None]
    plus = tl.load(offset + series, mask=exists, other=0.0)[:, None]
    for step in range(0, tl.cdiv(count, POSITIONS)):
        at = tile + (origin + (first + step * POSITIONS) * position_stride)
        inside = _inside(exists, step, count, POSITIONS)
        value = tl.load(x + at, mask=inside, other=0.0).to(gain.dtype.element_ty)
        tl.store(y + at, times * value + plus, mask=inside)


@triton.jit
def combined_kernel(
    x,
    dy,
    gain,
    slope,
    shift,
    dx,
    channels,
    length,
    part_length,
    channel_stride,
    position_stride,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """gain·dy + slope·x + shift."""
    series, exists, origin, tile, first, count = _place(
        channels, length, part_length, channel_stride, position_stride, CHANNELS, POSITIONS
    )
    work = gain.dtype.element_ty
    times = tl.load(gain + series, mask=exists, other=0.0)[:, None]
    times_x = tl.load(slope + series, mask=exists, other=0.0)[:, None]
    plus = tl.load(shift + series, mask=exists, other=0.0)[:, None]
    for step in range(0, tl.cdiv(count, POSITIONS)):
        at = tile + (origin + (first + step * POSITIONS) * position_stride)
        inside = _inside(exists, step, count, POSITIONS)
        down = tl.load(dy + at, mask=inside, other=0.0).to(work)
        value = tl.load(x + at, mask=inside, other=0.0).to(work)
        tl.store(dx + at, times * down + times_x * value + plus, mask=inside)
