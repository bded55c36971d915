"""What stands beside a norm, and what a start changes there: layers and the activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normswap.norms.precision import precise

__all__ = [
    "Activation",
    "Beside",
    "Centred",
    "Look",
    "Neighbour",
    "Previous",
    "Remade",
    "Replaced",
    "Rewritten",
    "Scale",
    "Stream",
]

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
class Previous:
    """The norm before the layer that feeds a norm.

    Args:
        norm: that norm, or ``None``.
        functions: the activations between it and the layer, in order: those that it runs itself,
            and one behind it.
        problem: why none is known; empty if one is.
    """

    norm: nn.Module | None = None
    functions: tuple[Callable[[Tensor], Tensor], ...] = ()
    problem: str = "nothing is known of it"


@dataclass(frozen=True)
class Activation:
    """The activation that alone reads a norm's output.

    Args:
        path: where it is, or where a child in the place of its call would be; empty if there is
            none.
        function: what it computes of a tensor, or ``None``.
        module: the activation itself, if it is a module that serves this norm alone.
        owner: otherwise the module whose forward calls it.
        name: of the owner's child that takes the call's place.
        fused: otherwise, if the norm itself runs it afterwards, the name of the norm's child.
        problem: why it may not be replaced; empty if it may.
    """

    path: str = ""
    function: Callable[[Tensor], Tensor] | None = None
    module: nn.Module | None = None
    owner: nn.Module | None = None
    name: str = ""
    fused: str = ""
    problem: str = "nothing is known of it"


@dataclass(frozen=True)
class Rewritten:
    """New values for a neighbour's parameters.

    Args:
        module: the neighbour.
        values: gives the new values by name, in terms of how the parameters will be by then; a
            name that the neighbour holds as ``None`` becomes a parameter, and one whose value is
            ``None`` becomes ``None``.
    """

    module: nn.Module
    values: Callable[[Look], Mapping[str, Tensor | None]]


@dataclass(frozen=True)
class Remade:
    """Another class for a neighbour, which computes something else with the same parameters.

    Args:
        module: the neighbour.
        mixin: what is put before its own class, see `normswap.norms.remake`.
    """

    module: nn.Module
    mixin: type[Any]


@dataclass(frozen=True)
class Replaced:
    """Another module for the activation that follows.

    Args:
        activation: the activation, which may be replaced.
        make: makes the module.
    """

    activation: Activation
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Scale:
    """A parameter of a value for each channel, by which they are multiplied.

    Args:
        module: whose parameter it is.
        name: its name there.
    """

    module: nn.Module
    name: str


@dataclass(frozen=True)
class Centred:
    """A parameter without its mean over a dimension.

    Norms that subtract the mean of what it makes are the same for it, so several norms may ask
    for it, and once is enough.

    Args:
        module: whose parameter it is.
        name: the parameter's name; ``None`` in its place is left.
        dim: the dimension that the channels are.
        scale: what multiplies the channels behind it, of which the mean is to be 0 then, or
            ``None``.
    """

    module: nn.Module
    name: str
    dim: int
    scale: Scale | None = None

    def value(self, look: Look) -> Tensor:
        """What the parameter becomes, in terms of how parameters will be by then."""
        before: Tensor = look(self.module, self.name)
        exact = precise(before)
        if self.scale is None:
            return (exact - exact.mean(self.dim, keepdim=True)).to(before.dtype)
        shape = [1] * before.ndim
        shape[self.dim] = -1
        scale = precise(look(self.scale.module, self.scale.name)).view(shape)
        mean = (scale * exact).mean(self.dim, keepdim=True)
        return (exact - mean / scale).to(before.dtype)


@dataclass(frozen=True)
class Stream:
    """The residual stream that a norm reads: all that is added up to its input.

    Args:
        writers: what makes the mean over channels 0 everywhere on it.
        training: whether that holds in training too; else dropout stands on it.
        problem: why it cannot be had; empty if it can.
    """

    writers: tuple[Centred, ...] = ()
    training: bool = True
    problem: str = "nothing is known of it"


#: One thing that a start changes outside of the norm.
Beside = Rewritten | Centred | Remade | Replaced
