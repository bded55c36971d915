"""Data, and loaders and models that fail on it at a chosen moment."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tests.stats.models import cut, images, net

SIZES = [4, 3, 5, 2]


def data() -> list[Tensor]:
    """Four batches, which their sizes tell apart."""
    return cut(images(sum(SIZES)), SIZES)


def draw() -> None:
    """Move every generator there is."""
    torch.rand(1)
    random.random()
    numpy.random.rand()


def error(*given: object) -> None:
    """Raise what a bug would raise."""
    raise LookupError("on purpose")


def ctrl_c(*given: object) -> None:
    """Do what a terminal does when Ctrl and C are pressed: Python raises `KeyboardInterrupt`."""
    signal.raise_signal(signal.SIGINT)


#: What stops a pass, and the exception it is seen as.
STOPS: dict[Callable[..., None], type[BaseException]] = {
    error: LookupError,
    ctrl_c: KeyboardInterrupt,
}


@dataclass
class Loader:
    """Reads the batches, and does something when it has yielded some of them; can be read again."""

    after: int
    act: Callable[[], None]
    batches: list[Tensor] = field(default_factory=data)

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(self.batches):
            if index == self.after:
                self.act()
            draw()
            yield batch
        if self.after == len(self.batches):
            self.act()


class At(nn.Module):
    """Does something to one of the batches, and remembers nothing."""

    def __init__(self, index: int, act: Callable[..., Any]) -> None:
        super().__init__()
        self.size, self.act = SIZES[index], act

    def forward(self, x: Tensor) -> Tensor:
        """Return what is given, or what is made of it."""
        if len(x) == self.size:
            draw()
            made = self.act(x)
            return x if made is None else made
        return x


class Stash:
    """Two layers that share what one of them has seen last, as parts of a model may.

    Forwards of such a model disturb each other, where one is stopped between the two.
    """

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def keep(self) -> nn.Module:
        """The layer that sees."""
        return _Keep(self)

    def recall(self) -> nn.Module:
        """The layer that adds it to what it is given."""
        return _Recall(self)


class _Keep(nn.Module):
    def __init__(self, stash: Stash) -> None:
        super().__init__()
        self.stash = stash

    def forward(self, x: Tensor) -> Tensor:
        self.stash.seen = x.square().mean()
        return x


class _Recall(_Keep):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.stash.seen


class Counting(nn.Module):
    """Counts its calls, and raises at one of them."""

    def __init__(self, raise_at: int | None = None) -> None:
        super().__init__()
        self._calls, self.raise_at = [0], raise_at

    def forward(self, x: Tensor) -> Tensor:
        """Return what is given."""
        self._calls[0] += 1
        if self.calls == self.raise_at:
            error()
        return x

    @property
    def calls(self) -> int:
        """How many there were: a pass puts attributes back, not what is in them."""
        return self._calls[0]


def counting(raise_at: int | None = None) -> nn.Sequential:
    """A net that counts its calls after the first norm, and raises at one of them."""
    return net().insert(2, Counting(raise_at))


def mixed() -> nn.Sequential:
    """A net whose modes, momenta, flags and hooks are all different."""
    model = net()
    model[1].momentum = None
    model[5].momentum = 0.3
    model[3].eval()
    model[0].requires_grad_(False)
    model[5].weight.requires_grad_(False)
    model[5].register_forward_hook(lambda module, args, output: None)
    model[1].register_forward_pre_hook(lambda module, args: None)
    return model
