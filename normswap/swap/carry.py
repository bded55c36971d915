"""What every replacement takes over from the module it replaces, whatever the two norms are."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cache

from torch import nn
from torch.nn.utils import parametrize

from normswap.norms.base import Norm
from normswap.norms.state import TENSORS

__all__ = ["carry_over", "moving_on", "share_hooks"]

_FRESH = vars(nn.Module())
_HOOKS = tuple(name for name in _FRESH if "hook" in name)


def carry_over(old: nn.Module, new: nn.Module, *, leave: Collection[str] = ()) -> None:
    """Give a new norm the mode, hooks, parametrizations, children and attributes of the old one.

    Hook dictionaries are shared, not copied, so that the handles given out for them stay valid.
    Nothing of the old module changes.

    Args:
        old: the module that is being replaced.
        new: its replacement, furnished with tensors.
        leave: names of further tensors that have no place in the new one.
    """
    new.training = old.training
    share_hooks(old, new)
    left = _left_behind(old) | set(leave)
    for held in ("_parameters", "_buffers", "_modules"):
        theirs, ours = getattr(old, held), getattr(new, held)
        for name, value in theirs.items():
            if name not in left and name not in ours:
                ours[name] = value
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set & new._buffers.keys())
    for name, value in vars(old).items():
        if name not in left and not hasattr(new, name):
            vars(new)[name] = value
    if parametrize.is_parametrized(old) and any(
        getattr(new, name, None) is not None for name in ("weight", "bias")
    ):
        parametrize.transfer_parametrizations_and_params(old, new)


def moving_on(old: nn.Module) -> set[str]:
    """Names of what a norm has beside the shared tensors, and any norm in its place will have."""
    held = (vars(old), old._parameters, old._buffers, old._modules)
    return {name for each in held for name in each} - _left_behind(old) - _FRESH.keys()


def _left_behind(old: nn.Module) -> frozenset[str]:
    """Names of what is a norm's own business, or goes over in another way."""
    own = set(old.own) if isinstance(old, Norm) else set()
    return _settings(type(old).__mro__) | set(TENSORS) | {"parametrizations"} | own


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have another one's hooks: the very dictionaries, and what is said of them."""
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]


@cache
def _settings(lineage: tuple[type, ...]) -> frozenset[str]:
    """What torch's norms and ours keep of their constructors' arguments: their business alone.

    What a user's own subclass keeps is the user's, and moves on.
    """
    found: set[str] = set()
    for ancestor in lineage:
        if ancestor is nn.Module:
            break
        if not ancestor.__module__.startswith(("torch.", "normswap.")):
            continue
        found.update(getattr(ancestor, "__constants__", ()))
        found.update(name for name in vars(ancestor) if not name.startswith("__"))
        if "__init__" in vars(ancestor):
            found.update(inspect.signature(ancestor.__init__).parameters)  # type: ignore[misc]
    return frozenset(found)
