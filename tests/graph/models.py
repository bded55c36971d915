"""Small models with something to see, or something in the way of seeing it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 4


def block() -> nn.Sequential:
    """A convolution, its norm, and the activation that follows."""
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())


def image() -> Tensor:
    """An input for all models here."""
    return torch.ones(2, CHANNELS, 3, 3)


class Around(nn.Module):
    """Computes a given function of its children ``conv``, ``norm`` and ``other``."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.other = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator,no-any-return]


class Branching(nn.Module):
    """Asks its data which way to go, which no trace can answer."""

    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.inside = block() if inside is None else inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return y if y.sum() > 0 else x


class Masked(nn.Module):
    """Goes another way when it is given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = block()
        self.masked = block()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.plain(x) if mask is None else self.masked(x * mask)


class Caching(nn.Module):
    """Keeps what it last computed, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()
        self.last: Tensor | None = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inside(x)
        self.all.append(self.last + x)
        return self.last


class Counting(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.inside(x)


class Residual(nn.Module):
    """Adds its input before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)
