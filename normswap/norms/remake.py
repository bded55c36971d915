"""Another class for a layer, which computes something else with the same parameters."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normswap.norms.beside import Neighbour
from normswap.norms.generated import generated

__all__ = ["Mixin", "parts", "remade", "why_not"]


class Mixin:
    """What is put before a layer's own class.

    Attributes:
        transparent: whether the layer computes what it computed before.
    """

    transparent: ClassVar[bool] = False


def remade(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """The class that has a mixin before a layer's own class; the same one for the same two."""
    one: Any = mixin
    other: Any = cls
    made: type[nn.Module] = _made(one, other)
    return made


@cache
def _made(mixin: Any, cls: Any) -> Any:
    again = partial(remade, mixin)
    name = f"{mixin.__name__}{cls.__name__}"
    return generated(cls, again, mixin, name=name, __doc__=mixin.__doc__)


def parts(cls: type[nn.Module]) -> tuple[type[Mixin] | None, type[nn.Module]]:
    """What was put before a layer's own class, if anything, and that class."""
    first, *rest = cls.__bases__
    return (first, rest[0]) if issubclass(first, Mixin) and rest else (None, cls)


def why_not(neighbour: Neighbour, *, transposed: bool = False) -> str:
    """Why a convolution or linear beside a norm may not be rewritten; empty if it may.

    Besides what the model around it says, it must be torch's own kind of layer: with a forward or
    a weight that is computed otherwise, what it computes is not known.

    Args:
        neighbour: the layer.
        transposed: whether it may be a transposed convolution.
    """
    module = neighbour.module
    if module is None or neighbour.problem:
        return neighbour.problem or "there is nothing"
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return f"a {type(module).__name__} cannot be rewritten"
    cls: Any
    mixin, cls = parts(type(module))
    if mixin is not None and not mixin.transparent:
        return (
            f"the layer before computes something else already ({mixin.__name__}), so that "
            "normswap.revert has to come first"
        )
    if isinstance(module, _ConvTransposeNd) and not transposed:
        return f"a {cls.__name__} is a transposed convolution"
    torchs = (base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules"))
    own: Any = next(torchs, nn.Module)
    if cls.forward is not own.forward or "forward" in vars(module):
        return f"a {cls.__name__} has a forward of its own"
    return "" if "weight" in module._parameters else f"the weight of a {cls.__name__} is computed"
