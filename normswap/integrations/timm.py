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
from normswap.norms.pool import NOTHING, Rule
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


#: What is known by class and left alone: the family and why nothing can be started from it.
_KNOWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("grn", "it is no standardization: its output scales with its input"): ("GlobalResponseNorm",),
    ("evonorm", "its activation is a part of its formula"): tuple(
        f"EvoNorm2d{form}" for form in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")
    ),
    ("frn", "it keeps no mean, and may end in a threshold of its own"): (
        "FilterResponseNormAct2d",
        "FilterResponseNormTlu2d",
    ),
    ("simple_norm", "it divides by the standard deviation and subtracts no mean"): (
        "SimpleNorm",
        "SimpleNorm2d",
        "SimpleNormFp32",
        "SimpleNorm2dFp32",
    ),
}


def install() -> None:
    """Teach the registry and the tracer what timm knows; doing it twice changes nothing."""
    from timm import layers
    from timm.layers import grn, norm

    readers = {name: partial(_read_with_tail, read) for read, n in _READERS.items() for name in n}
    readers |= {name: partial(_read_known, *about) for about, n in _KNOWN.items() for name in n}
    for module in (layers, norm, grn):  # not all are exported
        held = vars(module)
        add_readers({held[name]: read for name, read in readers.items() if name in held})
    leave_whole(layers.get_notrace_modules(), layers.get_notrace_functions())


def _read_known(kind: str, obstacle: str, module: nn.Module) -> NormState:
    """Read a layer that is known and left alone."""
    weight = module._parameters.get("weight")
    return NormState(
        norm="",
        kind=kind,
        num_features=0 if weight is None else weight.numel(),
        rule=Rule.always(NOTHING),
        obstacle=obstacle,
    )


def _read_with_tail(read: Reader, module: nn.Module) -> NormState:
    """Read a norm that runs its children ``drop`` and ``act``, where it has them, afterwards."""
    tail = tuple(name for name in ("drop", "act") if name in module._modules)
    return replace(read(module), tail=tail)
