"""How a map of (N, C, *) lies in memory, and how what belongs to it is brought in line."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["beside", "layout", "matching", "positions_last", "work_dtype"]


def work_dtype(x: Tensor) -> torch.dtype:
    """What the statistics of an input are: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def layout(x: Tensor) -> str:
    """How a map lies in memory: by ``"rows"`` of positions or by ``"columns"`` of channels.

    Empty for any other strides.
    """
    if x.is_contiguous():
        return "rows"
    return "columns" if x.movedim(1, -1).is_contiguous() else ""


def matching(dy: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype and memory format of the input that it belongs to."""
    dy = dy.to(x.dtype)
    if dy.stride() == x.stride():
        return dy
    if layout(x) == "columns":
        return dy.movedim(1, -1).contiguous().movedim(-1, 1)
    return dy.contiguous()


def positions_last(x: Tensor) -> Tensor:
    """(N, C, *) as (N, C, L)."""
    return x[..., None] if x.ndim == 2 else x.flatten(2)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """(N, C) with ones behind, as many as the map has dimensions of positions."""
    return values.view(*values.shape, *[1] * (x.ndim - 2))
