"""What writes to a residual stream: parameters of which the mean over channels can be taken out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from normswap.graph.linear import channels_of_layer
from normswap.norms.beside import Centred, Scale

__all__ = ["NoStream", "Place", "Writers"]

#: How many times as large a parameter may become where what scales it differs between channels:
#: what it makes has to stay within half precision, in which the model may run.
GROWTH = 1e4


class NoStream(Exception):
    """Why a stream cannot be centred."""


@dataclass(frozen=True)
class Place:
    """Where the channels are, and what scales them before they are added to the stream."""

    dim: int
    scale: Scale | None = None


class Writers:
    """Collects the parameters that write to a stream, or says why one cannot."""

    def __init__(self) -> None:
        self._centred: dict[tuple[int, str], Centred] = {}

    @property
    def centred(self) -> tuple[Centred, ...]:
        """What becomes of them."""
        return tuple(self._centred.values())

    def has(self, module: nn.Module | None, name: str = "") -> bool:
        """Whether a parameter of a module is one of them, or with no name any of its own."""
        if name:
            return (id(module), name) in self._centred
        return any(owner == id(module) for owner, _ in self._centred)

    def add_layer(self, module: nn.Module, path: str, place: Place, ndim: int) -> None:
        """Take the mean out of what a layer makes.

        Args:
            module: the layer.
            path: where it is.
            place: of the channels in its output.
            ndim: how many dimensions that has.
        """
        at, dims = channels_of_layer(module)
        if not dims or at % ndim != place.dim:
            raise NoStream(f"{path} ({type(module).__name__}) writes to its stream")
        for name, dim in dims.items():
            self.add(module, name, replace(place, dim=dim))

    def add(self, module: nn.Module, name: str, place: Place) -> None:
        """Take the mean out of a parameter, if there is one of that name."""
        if name not in module._parameters:
            raise NoStream(f"the {name} of a {type(module).__name__} on its stream is computed")
        if module._parameters[name] is None:
            return
        writer = Centred(module, name, place.dim, place.scale)
        if self._centred.setdefault((id(module), name), writer) != writer:
            raise NoStream(f"a {type(module).__name__} is added to its stream with two scales")
        if place.scale is not None and not _stays_in_bounds(writer):
            raise NoStream(
                f"the {name} of a {type(module).__name__} has no mean to be taken out: what scales "
                "it for its stream is zero for some channels, or nearly"
            )


def _stays_in_bounds(writer: Centred) -> bool:
    """Whether a parameter can be centred behind its scale, as it is."""
    with torch.no_grad():
        before = writer.module._parameters[writer.name]
        value = writer.value(lambda module, name: module._parameters[name])
        if before is None or value.is_meta or not value.numel():
            return True
        return bool(value.abs().max() <= GROWTH * before.abs().max())
