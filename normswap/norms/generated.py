"""Classes that are generated for an instance, which stays what it is to everybody else.

A layer or a model gets one in the place of its own class, keeps its parameters, hooks and keys,
and gets its own class back when the change is taken back. No module holds such a class by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

__all__ = ["generated"]


def generated(
    beneath: Any,
    again: Callable[[Any], type[nn.Module]],
    *mixins: type,
    name: str | None = None,
    **members: Any,
) -> Any:
    """A subclass of a class, whose instances copy and pickle as those of the class do.

    Args:
        beneath: the class, which may be a generated one.
        again: makes the subclass of the class once more; it can be pickled.
        *mixins: classes to come before it.
        name: of the subclass; ``None`` for the name of the class.
        **members: of the subclass.
    """

    def reduce(module: nn.Module, protocol: Any) -> Any:
        make, arguments, *rest = beneath.__reduce_ex__(module, protocol)
        own = tuple(beneath if each is type(module) else each for each in arguments)
        return _made, (make, own, again), *rest

    common: dict[str, Any] = {
        "_normswap_base": vars(beneath).get("_normswap_base", beneath),
        "__reduce_ex__": reduce,
        "__module__": beneath.__module__,
        "__qualname__": beneath.__qualname__,
        "__doc__": beneath.__doc__,
    }
    for own in ("__copy__", "__deepcopy__"):
        if hasattr(beneath, own):
            common[own] = _of_its_kind(getattr(beneath, own), again)
    return type(name or beneath.__name__, (*mixins, beneath), common | members)


def _made(
    make: Callable[..., nn.Module],
    arguments: tuple[Any, ...],
    again: Callable[[Any], type[nn.Module]],
) -> nn.Module:
    module = make(*arguments)
    module.__class__ = again(type(module))
    return module


def _of_its_kind(
    copying: Callable[..., nn.Module], again: Callable[[Any], type[nn.Module]]
) -> Callable[..., nn.Module]:
    """A class's own way of copying, whose copy has the generated class as well."""

    @wraps(copying)
    def copied(self: nn.Module, *args: Any) -> nn.Module:
        made = copying(self, *args)
        if type(made) is not type(self):
            made.__class__ = again(type(made))
        return made

    return copied
