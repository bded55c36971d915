"""The standardizations that an unknown module may compute, as plain formulas on its layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normswap.norms.pool import BATCH, POSITION, Pool, per_group

__all__ = ["Layout", "layouts", "pools", "spread", "standardized"]


@dataclass(frozen=True)
class Layout:
    """Where the channels of an input are, and an input to try.

    Args:
        channel_dim: 1 or -1.
        shape: of the input.
    """

    channel_dim: int
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """How many positions a sample has."""
        return math.prod(self.shape) // (self.shape[0] * self.shape[self.channel_dim])

    @property
    def dim(self) -> int:
        """How many dimensions the positions have."""
        return len(self.shape) - 2

    def larger(self) -> Layout:
        """The same of twice as many samples and positions."""
        channels = self.channel_dim % len(self.shape)
        grown = (n if at == channels else 2 * n for at, n in enumerate(self.shape))
        return replace(self, shape=tuple(grown))

    def of_channels(self, values: Tensor) -> Tensor:
        """The mean of each channel, (C,)."""
        return values.movedim(self.channel_dim, 0).flatten(1).mean(1)

    def beside(self, values: Tensor) -> Tensor:
        """Values of the channels (C,), as they broadcast against an input."""
        shape = [1] * len(self.shape)
        shape[self.channel_dim] = -1
        return values.view(shape)

    def as_maps(self, x: Tensor) -> Tensor:
        """An input as (N, C, L)."""
        return x.movedim(self.channel_dim, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)

    def from_maps(self, maps: Tensor, like: Tensor) -> Tensor:
        """Undo `as_maps`."""
        moved = maps.reshape(like.movedim(self.channel_dim, 1).shape)
        return moved.movedim(1, self.channel_dim)


def layouts(channels: int) -> list[Layout]:
    """Inputs to try: tokens first, then maps with the channels last and first, then (N, C)."""
    a, b, c = [n for n in (3, 4, 5, 6, 7) if n != channels][:3]
    last = [Layout(-1, (2, a, channels)), Layout(-1, (2, a, b, channels))]
    first = [(a, b), (a,), (a, b, c), ()]
    return [*last, *(Layout(1, (2 if rest else 8, channels, *rest)) for rest in first)]


def pools(channels: int, layout: Layout) -> Iterator[Pool]:
    """What may be pooled."""
    yield POSITION
    yield Pool("position", centred=False)
    yield BATCH
    if layout.channel_dim == 1 and layout.dim:
        sizes = [size for size in range(1, channels + 1) if channels % size == 0]
        yield from (per_group(size) for size in reversed(sizes))
        yield from (per_group(size, centred=False) for size in (channels, 1))


def spread(x: Tensor, layout: Layout, pool: Pool) -> tuple[Tensor, Tensor]:
    """An input less its mean, where the pool is centred, and the biased variance, as the input."""
    maps = layout.as_maps(x)
    parts = torch.unflatten(maps, 1, (-1, pool.channels)) if pool.over == "group" else maps
    dims = {"position": (1,), "batch": (0, 2), "group": (2, 3)}[pool.over]
    centred = parts - parts.mean(dims, keepdim=True) if pool.centred else parts
    variance = centred.square().mean(dims, keepdim=True).expand_as(parts)
    return layout.from_maps(centred, x), layout.from_maps(variance, x)


def standardized(x: Tensor, layout: Layout, pool: Pool, eps: float) -> Tensor:
    """An input less its mean, by the root of the variance and eps."""
    centred, variance = spread(x, layout, pool)
    return centred / (variance + eps).sqrt()
