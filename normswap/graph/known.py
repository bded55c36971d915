"""Which modules are norms: by their class, or else by their behaviour."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from normswap.graph.behaviour import Behaviour, Unexplained, behaviour_of
from normswap.norms.pool import Pool
from normswap.norms.reading import has_parametrized_affine
from normswap.norms.registry import reader
from normswap.norms.renamed import per_channel
from normswap.norms.state import NormState

__all__ = ["is_norm", "kind_of", "looks_like_a_norm", "read_by_behaviour", "recognised"]

#: What modules of a class were found to do, by what makes one of them differ from another.
_FOUND: WeakKeyDictionary[type[nn.Module], dict[Any, Behaviour | Unexplained | None]]
_FOUND = WeakKeyDictionary()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of a known class or of one that behaves like it."""
    return reader(type(module)) is not None or isinstance(recognised(module), Behaviour)


def looks_like_a_norm(module: nn.Module) -> str:
    """Why a module that is called a norm, or has the tensors of one, is none; empty for others."""
    found = recognised(module)
    if not isinstance(found, Unexplained):
        return ""
    named = "norm" in type(module).__name__.lower()
    return found.reason if named or any(t.numel() > 1 for t in module.parameters()) else ""


def recognised(module: nn.Module) -> Behaviour | Unexplained | None:
    """What a module behaves like, if its class does not say; asked once for all of its kind."""
    known = reader(type(module))
    plain: Any = parametrize.type_before_parametrizations(module)
    if known is not None and plain.forward is known[1].forward:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return None
    of_class = _FOUND.setdefault(type(module), {})
    kind = kind_of(module)
    if kind is None:
        return behaviour_of(module)
    if kind not in of_class:
        of_class[kind] = behaviour_of(module)
    return of_class[kind]


def read_by_behaviour(module: nn.Module, found: Behaviour) -> NormState:
    """Read a module that behaves like a norm."""
    pool, size = found.rule.train, found.num_features
    norm, kind = _family(pool, size, found.layout.channel_dim)
    settings: dict[str, object] = {"eps": found.eps, "affine": "weight" in found.names}
    if norm == "gn":
        settings["num_groups"] = size // pool.channels
    return NormState(
        norm=norm,
        kind=kind,
        num_features=size,
        rule=found.rule,
        eps=found.eps,
        momentum=_momentum(module),
        counts=found.counts,
        dim=found.dim,
        channel_dim=found.layout.channel_dim,
        settings=settings,
        parametrized=has_parametrized_affine(module),
        names={
            name: held
            for name, held in found.names.items()
            if name != held or getattr(module, held).ndim != 1
        },
        like=next((t for t in module.parameters() if t.is_floating_point()), None),
        **_tensors(module, found),
    )


def _family(pool: Pool, size: int, channel_dim: int) -> tuple[str, str]:
    """Name and family of the norm that pools so."""
    first = channel_dim == 1
    if pool.over in ("batch", "running"):
        return ("bn" if pool.over == "batch" else "frozen_bn"), "batch_norm"
    if pool.over == "position":
        if pool.centred:
            return ("ln2d" if first else "ln"), "layer_norm"
        return ("rms2d" if first else "rms"), "rms_norm"
    if not pool.centred:
        return ("rms", "rms_norm") if pool.channels == size else ("", "rms_norm")
    if pool.channels == size:
        return "ln", "layer_norm"
    return ("in", "instance_norm") if pool.channels == 1 else ("gn", "group_norm")


def _momentum(module: nn.Module) -> float:
    told = getattr(module, "momentum", 0.1)
    return told if isinstance(told, float) else 0.1


def _tensors(module: nn.Module, found: Behaviour) -> dict[str, Any]:
    """Its tensors under `NormState`'s names."""
    return {name: per_channel(getattr(module, held)) for name, held in found.names.items()}


def kind_of(module: nn.Module) -> tuple[Any, ...] | None:
    """What tells a module of a class from another: settings and shapes; ``None`` if more does."""
    settings = []
    for name, value in vars(module).items():
        if name == "training" or name in _OF_EVERY_MODULE:
            continue
        if not isinstance(value, (int, float, bool, str, type(None), tuple)):
            return None
        settings.append((name, value))
    tensors = (*module._parameters.items(), *module._buffers.items())
    shapes = tuple((name, None if t is None else tuple(t.shape)) for name, t in tensors)
    return (tuple(settings), shapes)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
