"""Changes to a model that are made all or none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Changes"]


@dataclass
class Changes:
    """What is to happen to a model, collected first and then made at once.

    Args:
        modules: pairs of a module of the model and its replacement.
        writes: pairs of a tensor and the values that it is to hold.
        flags: pairs of a parameter and its ``requires_grad`` to be.
    """

    modules: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    writes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    flags: list[tuple[Tensor, bool]] = field(default_factory=list)

    def make(self, model: nn.Module) -> nn.Module:
        """Make all changes, or on any exception, an interrupt included, none.

        Returns:
            The model, or its replacement where the model itself was replaced.
        """
        replacement = {id(old): new for old, new in self.modules}
        with ExitStack() as undo:
            for parent in list(model.modules()):
                for name, child in parent._modules.items():
                    if child is not None and id(child) in replacement:
                        _do(undo, parent._modules.__setitem__, name, child, replacement[id(child)])
            for old, new in self.modules:
                undo.callback(_bind_hooks, new, old)
                _bind_hooks(new, new)
            for tensor, value in self.writes:
                _do(undo, _write_to(tensor), None, tensor.detach().clone(), value)
            for parameter, flag in self.flags:
                _do(undo, _flag_of(parameter), None, parameter.requires_grad, flag)
            undo.pop_all()
        return replacement.get(id(model), model)


def _do(undo: ExitStack, put: Callable[[Any, Any], None], key: Any, before: Any, after: Any) -> None:
    """Put ``after``, and let ``undo`` put ``before``; registered first, lest an interrupt slip in."""
    undo.callback(put, key, before)
    put(key, after)


def _write_to(tensor: Tensor) -> Callable[[Any, Tensor], None]:
    def write(_: Any, value: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(value)

    return write


def _flag_of(parameter: Tensor) -> Callable[[Any, bool], None]:
    def flag(_: Any, value: bool) -> None:
        parameter.requires_grad_(value)

    return flag


def _bind_hooks(holder: nn.Module, owner: nn.Module) -> None:
    """Let the load hooks that remember their module remember ``owner``.

    Old and new module share their hook dictionaries, so that a handle removes its hook from both.
    """
    hooks: OrderedDict[int, Any] = holder._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            hooks[key] = type(hook)(hook.hook, owner)
