"""timm's norms that carry a dropout and an activation, and what timm wants traced whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from normswap.graph.tracer import leave_whole
from normswap.norms.batch import read_batch_norm
from normswap.norms.entry import Reader
from normswap.norms.group import read_group_norm
from normswap.norms.registry import add_readers
from normswap.norms.state import NormState
from normswap.norms.sync_batch import read_sync_batch_norm

__all__ = ["install"]


def install() -> None:
    """Teach the registry and the tracer what timm knows; doing it twice changes nothing."""
    from timm.layers import (
        BatchNormAct2d,
        GroupNorm1Act,
        GroupNormAct,
        SyncBatchNormAct,
        get_notrace_functions,
        get_notrace_modules,
    )

    add_readers(
        {
            BatchNormAct2d: _with_tail(read_batch_norm),
            SyncBatchNormAct: _with_tail(read_sync_batch_norm),
            GroupNormAct: _with_tail(read_group_norm),
            GroupNorm1Act: _with_tail(read_group_norm),
        }
    )
    leave_whole(get_notrace_modules(), get_notrace_functions())


def _with_tail(read: Callable[[nn.Module], NormState]) -> Reader:
    """A reader of a class that runs its children ``drop`` and ``act`` after the norm."""
    return partial(_read_with_tail, read)


def _read_with_tail(read: Callable[[nn.Module], NormState], module: nn.Module) -> NormState:
    tail = tuple(name for name in ("drop", "act") if name in module._modules)
    return replace(read(module), tail=tail)
