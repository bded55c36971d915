"""What a start rewrites outside of the norm: the layer before it, or after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Beside", "Look", "Neighbour"]

#: ``look(module, name)``: a parameter as it will be when the changes planned so far are made.
Look = Callable[[nn.Module, str], Any]


@dataclass(frozen=True)
class Neighbour:
    """A layer beside a norm, as far as it is the norm's alone.

    Args:
        path: where it is; empty if there is none.
        module: the layer, or ``None``.
        problem: why it may not be rewritten for the norm's sake; empty if it may.
    """

    path: str = ""
    module: nn.Module | None = None
    problem: str = "nothing is known of it"


@dataclass(frozen=True)
class Beside:
    """A rewrite of a neighbour's parameters.

    Args:
        module: the neighbour.
        values: gives the new values by name, in terms of how the parameters will be by then; a
            name that the neighbour holds as ``None`` becomes a parameter.
    """

    module: nn.Module
    values: Callable[[Look], Mapping[str, Tensor]]
