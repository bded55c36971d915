"""The passes on CUDA and ROCm, as Triton programs over rows and columns alike.

Moments read a map once, as the two sums read both of theirs; what is elementwise reads once and
writes once. Where there are fewer channels than keep a device busy, their positions are cut in
parts, and what is found of the parts is merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.passes import kernels
from normswap.norms.passes.shapes import layout, matching, work_dtype

__all__ = ["channel_sums", "combined", "moments", "scaled"]

#: Values that a program takes at a time.
TILE = 1024

#: Channels that are taken together where they lie together.
WIDE = 64

#: So many programs keep any device busy.
PROGRAMS = 4096

#: Tiles that a program goes through before channels are cut: parts of sums cost a merge.
SUMMED_TILES, MAPPED_TILES = 4, 1


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions."""
    cut = _Cut.of(x, SUMMED_TILES)
    mean, var = x.new_empty(2, *x.shape[:2], cut.parts, dtype=work_dtype(x))
    told = {**cut.told, "WHOLE": cut.parts == 1}
    _launch(kernels.moments_kernel, cut.grid, x, mean, var, **told)
    if cut.parts > 1:
        return _merged(x, mean, var, cut)
    return mean.squeeze(-1), var.squeeze(-1)


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset."""
    cut = _Cut.of(x, MAPPED_TILES)
    y = torch.empty_like(x)
    beside = (each.contiguous() for each in (gain, offset))
    _launch(kernels.scaled_kernel, cut.grid, x, *beside, y, **cut.told)
    return y


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy."""
    cut = _Cut.of(x, SUMMED_TILES)
    both = mean.new_empty(2, *x.shape[:2], cut.parts)
    dy, mean = matching(dy, x), mean.contiguous()
    _launch(kernels.channel_sums_kernel, cut.grid, x, dy, mean, *both, **cut.told)
    products, sums = both.sum(-1) if cut.parts > 1 else both.squeeze(-1)
    return products, sums


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift."""
    cut = _Cut.of(x, MAPPED_TILES)
    dx = torch.empty_like(x)
    beside = (each.contiguous() for each in (gain, slope, shift))
    _launch(kernels.combined_kernel, cut.grid, x, matching(dy, x), *beside, dx, **cut.told)
    return dx


def _merged(x: Tensor, part_mean: Tensor, part_var: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Mean and variance of all positions from those of the parts, (N, C) from (N, C, parts)."""
    count, width = x.shape[0] * x.shape[1], _power(cut.parts)
    together = max(1, TILE // width)
    mean, var = part_mean.new_empty(2, *x.shape[:2])
    told = {key: size for key, size in cut.told.items() if key.islower()}
    told |= {"all_channels": count, "CHANNELS": together, "PARTS": width}
    grid = (-(-count // together),)
    _launch(kernels.merge_kernel, grid, x, part_mean, part_var, mean, var, **told)
    return mean, var


def _launch(kernel: Any, grid: tuple[int], x: Tensor, *others: Tensor, **told: int) -> None:
    """Run as many programs as that where a map is, which need not be the current device."""
    with torch.cuda.device(x.get_device()):
        kernel[grid](x, *others, **told)


@dataclass(frozen=True)
class _Cut:
    """How a map is cut for programs."""

    samples: int
    channels: int
    length: int
    part_length: int
    channel_stride: int
    position_stride: int
    tile: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, tiles: int) -> _Cut:
        """For a map by rows or columns, and parts of no fewer tiles than that."""
        samples, channels, length = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        if layout(x) == "rows":
            # Samples make no difference to rows: they are more channels.
            samples, channels = 1, samples * channels
            strides = length, 1
            positions = min(_power(length), TILE)
            tile = min(_power(channels), TILE // positions), positions
        else:
            strides = 1, channels
            wide = min(_power(channels), WIDE)
            # So few positions that offsets within a tile are 32 bits wide.
            tall = max(1, min(TILE // wide, 2**30 // _power(channels)))
            tile = wide, min(_power(length), tall)
        programs = samples * -(-channels // tile[0])
        steps = -(-length // tile[1])
        parts = max(1, min(-(-PROGRAMS // programs), steps // tiles))
        return cls(samples, channels, length, -(-steps // parts) * tile[1], *strides, tile)

    @property
    def parts(self) -> int:
        return -(-self.length // self.part_length)

    @property
    def grid(self) -> tuple[int]:
        return (self.samples * -(-self.channels // self.tile[0]) * self.parts,)

    @property
    def told(self) -> dict[str, int]:
        """What all programs over a map are told of it."""
        return {
            "channels": self.channels,
            "length": self.length,
            "part_length": self.part_length,
            "channel_stride": self.channel_stride,
            "position_stride": self.position_stride,
            "CHANNELS": self.tile[0],
            "POSITIONS": self.tile[1],
        }


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()
