"""A copy of a model for looking only: its own modules, attributes and buffers, no hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["as_meta", "meta_copy", "sharing_copy", "structure_copy"]

M = TypeVar("M", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def structure_copy(model: M) -> M:
    """Copy the modules but not the weights: cheap in time and memory for any size.

    Tracing and running may leave what they like in the copy, count in its buffers and append to
    its lists; the model never sees it, and the user's hooks are not called.

    Raises:
        Exception: whatever ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo.update((id(tensor), tensor) for tensor in _tensors(list(vars(module).values())))
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().clone()
    return _without_hooks(copy.deepcopy(model, memo))


def meta_copy(model: M) -> M:
    """Copy the modules for a run of shapes alone: all tensors are on the meta device.

    Raises:
        Exception: whatever ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors(list(vars(module).values())):
            empty = as_meta(tensor)
            memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return _without_hooks(copy.deepcopy(model, memo))


def as_meta(value: Any) -> Any:
    """A tensor of the same shape and type without values; anything else as it is."""
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _without_hooks(copied: M) -> M:
    """A copy without the hooks that it has of the model."""
    for module in copied.modules():
        for name in _HOOKS:
            vars(module)[name] = OrderedDict()
    return copied


def sharing_copy(model: M, own: Iterable[Tensor]) -> M:
    """Copy a model for running: its parameters are the model's, except for some.

    Modules, buffers, hooks and attributes are the copy's own.

    Args:
        model: any module.
        own: the parameters that the copy has of its own.
    """
    apart = {id(tensor) for tensor in own}
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in model.parameters() if id(tensor) not in apart
    }
    for module in model.modules():
        for tensor in _tensors(list(vars(module).values())):
            if not tensor.is_leaf:  # such as what a hook has computed, which deepcopy refuses
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value, through any plain containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in list(value.values()):
            yield from _tensors(part)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _tensors(part)
