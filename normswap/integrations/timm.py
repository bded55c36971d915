"""timm's norms, with and without activation, and what timm wants traced whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from normswap.graph.tracer import leave_whole
from normswap.norms.batch import read_batch_norm
from normswap.norms.entry import Reader
from normswap.norms.frozen import read_frozen_batch_norm
from normswap.norms.group import read_group_norm
from normswap.norms.layer import read_layer_norm
from normswap.norms.registry import add_readers
from normswap.norms.rms import read_rms_norm
from normswap.norms.state import NormState
from normswap.norms.sync_batch import read_sync_batch_norm

__all__ = ["install"]

#: How each class is read, by name: older versions of timm lack some.
_READERS: dict[Reader, tuple[str, ...]] = {
    read_batch_norm: ("BatchNormAct2d",),
    read_sync_batch_norm: ("SyncBatchNormAct",),
    read_frozen_batch_norm: ("FrozenBatchNormAct2d",),
    read_group_norm: ("GroupNorm", "GroupNormAct", "GroupNorm1", "GroupNorm1Act"),
    read_layer_norm: ("LayerNorm", "LayerNormFp32", "LayerNormAct", "LayerNormActFp32"),
    partial(read_layer_norm, norm="ln2d", channel_dim=1): (
        "LayerNorm2d",
        "LayerNorm2dFp32",
        "LayerNormExp2d",
        "LayerNormAct2d",
        "LayerNormAct2dFp32",
    ),
    read_rms_norm: ("RmsNorm", "RmsNormFp32", "RmsNormAct", "RmsNormActFp32"),
    partial(read_rms_norm, norm="rms2d", channel_dim=1): (
        "RmsNorm2d",
        "RmsNorm2dFp32",
        "RmsNormAct2d",
        "RmsNormAct2dFp32",
    ),
}


def install() -> None:
    """Teach the registry and the tracer what timm knows; doing it twice changes nothing."""
    from timm import layers

    add_readers(
        {
            getattr(layers, name): partial(_read_with_tail, read)
            for read, names in _READERS.items()
            for name in names
            if hasattr(layers, name)
        }
    )
    leave_whole(layers.get_notrace_modules(), layers.get_notrace_functions())


def _read_with_tail(read: Reader, module: nn.Module) -> NormState:
    """Read a norm that runs its children ``drop`` and ``act``, where it has them, afterwards."""
    tail = tuple(name for name in ("drop", "act") if name in module._modules)
    return replace(read(module), tail=tail)
