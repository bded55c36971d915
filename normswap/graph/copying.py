"""A copy of a model for looking only: its own modules and attributes, the same tensors."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["structure_copy"]

M = TypeVar("M", bound=nn.Module)


def structure_copy(model: M) -> M:
    """Copy the modules but none of the tensors: cheap in time and memory for any size.

    Tracing and hooks may leave what they like in the copy; the model never sees it.

    Raises:
        Exception: whatever ``copy.deepcopy`` raises for an attribute that cannot be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            memo.update((id(value), value) for value in held.values() if isinstance(value, Tensor))
    return copy.deepcopy(model, memo)
