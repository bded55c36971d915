"""timm's norms, with and without activation, and what timm wants traced whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from normswap.graph.tracer import leave_whole
from normswap.norms.entry import Reader
from normswap.norms.pool import NOTHING, Curve, Pool, Rule
from normswap.norms.reading import tensors
from normswap.norms.registry import add_readers
from normswap.norms.standardization.filter_response import TLU, Response
from normswap.norms.standardization.rms import read_rms_norm
from normswap.norms.state import NormState
from normswap.norms.statistics.batch import read_batch_norm
from normswap.norms.statistics.frozen import read_frozen_batch_norm
from normswap.norms.statistics.group import read_group_norm
from normswap.norms.statistics.layer import over_several, read_layer_norm
from normswap.norms.statistics.sync_batch import read_sync_batch_norm

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
    from timm.layers import grn, norm

    readers: dict[str, Reader] = {
        name: partial(_read_with_tail, read) for read, n in _READERS.items() for name in n
    }
    readers |= {name: read for read, n in _OF_ITS_OWN.items() for name in n}
    for module in (layers, norm, grn):  # not all are exported
        held = vars(module)
        add_readers({held[name]: read for name, read in readers.items() if name in held})
    leave_whole(layers.get_notrace_modules(), layers.get_notrace_functions())


def _read_with_tail(read: Reader, module: nn.Module) -> NormState:
    """Read a norm that runs its children ``drop`` and ``act``, where it has them, afterwards."""
    tail = tuple(name for name in ("drop", "act") if name in module._modules)
    return replace(read(module), tail=tail)


def _read_response(module: Any) -> NormState:
    """Read a global response norm, which is left alone."""
    return NormState(
        norm="",
        kind="grn",
        num_features=module.weight.numel(),
        rule=Rule.always(NOTHING),
        obstacle="it is no standardization: its output scales with its input",
    )


def _read_evonorm(module: Any, *, act: Callable[[], nn.Module] | None) -> NormState:
    """Read a norm and an activation in one.

    Args:
        module: the norm.
        act: makes the activation that comes nearest; ``None`` where it has one, as its child.
    """
    form, active = type(module).__name__, module.apply_act
    make = act or partial(module.get_submodule, "act")
    standardizes = active or form.endswith("a")
    return NormState(
        norm="",
        kind="evonorm",
        rule=Rule.always(Curve(curve=form if standardizes else "linear")),
        within={"act": make} if active else {},
        tail=("act",) if active else (),
        **_of_maps(module),
    )


def _read_filter_response(module: Any) -> NormState:
    """Read a filter response norm, with the threshold or the activation behind it."""
    learns = getattr(module, "tau", None) is not None
    return NormState(
        norm="",
        kind="filter_response_norm",
        rule=Rule.always(Response("group", centred=False)),
        within={"act": partial(_threshold, module)} if learns else {},
        tail=("act",) if learns or "act" in module._modules else (),
        **_of_maps(module),
    )


def _threshold(module: Any) -> TLU:
    """The threshold behind a norm, by the norm's own parameter."""
    unit = TLU(module.tau.numel())
    unit.tau = module.tau
    return unit


def _of_maps(module: Any) -> dict[str, Any]:
    """What is told alike of norms that take maps (N, C, H, W) and are like none of torch's."""
    computed = [name for name in ("v", "tau") if parametrize.is_parametrized(module, name)]
    return {
        "obstacle": f"its {computed[0]} is parametrized; remove that first" if computed else "",
        "num_features": module.weight.numel(),
        "eps": module.eps,
        "momentum": getattr(module, "momentum", 0.1),
        "dim": 2,
        "own": tuple(name for name in ("v", "tau") if name in module._parameters),
        **tensors(module),
    }


@dataclass(frozen=True)
class _Spread(Pool):
    """The C values at a position by their deviation, while their mean stays."""


def _read_simple_norm(module: Any, channel_dim: int = -1) -> NormState:
    """Read a norm that divides by the deviation over the channels and subtracts no mean."""
    shape, weight = tuple(module.normalized_shape), module.weight
    dim = 2 if channel_dim == 1 else None
    return NormState(
        norm="",
        kind="simple_norm",
        num_features=math.prod(shape),
        rule=Rule.always(_Spread("position", centred=False, unbiased=True)),
        eps=module.eps,
        dim=dim,
        channel_dim=channel_dim,
        obstacle=over_several(shape, weight),
        **tensors(module),
    )


#: How those are read that no target is like.
_OF_ITS_OWN: dict[Reader, tuple[str, ...]] = {
    _read_response: ("GlobalResponseNorm",),
    partial(_read_evonorm, act=nn.ReLU): ("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"),
    partial(_read_evonorm, act=nn.SiLU): ("EvoNorm2dS0", "EvoNorm2dS0a"),
    partial(_read_evonorm, act=None): tuple(f"EvoNorm2dS{form}" for form in ("1", "1a", "2", "2a")),
    _read_filter_response: ("FilterResponseNormAct2d", "FilterResponseNormTlu2d"),
    _read_simple_norm: ("SimpleNorm", "SimpleNormFp32"),
    partial(_read_simple_norm, channel_dim=1): ("SimpleNorm2d", "SimpleNorm2dFp32"),
}
