"""Norms that hold tensors under the names that the module they replace has for them.

A layer that somebody wrote may call its gain ``gamma``, and shape it (C, 1, 1). A norm in its
place has the same parameter under the same key, and sees it as ``weight`` (C,).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from normswap.norms.generated import generated

__all__ = ["look_through", "names_of", "per_channel", "rename", "whole"]


def names_of(norm: nn.Module) -> dict[str, str]:
    """What a norm calls its tensors, by their names in a `NormState`, where those differ."""
    return dict(getattr(type(norm), "_normswap_names", ()))


def rename(norm: nn.Module, names: Mapping[str, str], source: nn.Module) -> None:
    """Let a norm hold some of its tensors as the module that it replaces does.

    Args:
        norm: a norm that has them as its own until now, (C,) each.
        names: for each tensor, what the source calls it; its own name if only the shape differs.
        source: the module that holds them.
    """
    if not names:
        return
    for name, held in names.items():
        norm._parameters.pop(name, None)
        norm._buffers.pop(name, None)
        if held in source._parameters:
            norm._parameters[held] = source._parameters[held]
        else:
            norm._buffers[held] = source._buffers[held]
    look_through(norm, names)


def look_through(norm: nn.Module, names: Mapping[str, str]) -> None:
    """Let a norm find tensors, (C,) each, in what it holds under other names."""
    if names:
        norm.__class__ = _renamed_class(tuple(names.items()), type(norm))


def per_channel(tensor: Tensor) -> Tensor:
    """A tensor that has one value for each channel as (C,): itself, or a view of it.

    One that varies along several dimensions stays as it is.
    """
    single = tensor.ndim > 1 and tensor.numel() == max(tensor.shape)
    return tensor.flatten() if single else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that another one, or itself, is a view of."""
    return tensor if tensor._base is None else tensor._base


def _renamed_class(names: tuple[tuple[str, str], ...], cls: Any) -> Any:
    members: dict[str, Any] = {
        name: property(partial(_held, attribute)) for name, attribute in names
    }
    again = partial(_renamed_class, names)
    return generated(cls, again, _normswap_names=names, **members)


def _held(attribute: str, norm: nn.Module) -> Tensor | None:
    held: Mapping[str, Any] = {**vars(norm), **norm._buffers, **norm._parameters}
    tensor = held.get(attribute)
    return None if tensor is None else per_channel(tensor)
