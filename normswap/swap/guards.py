"""Models that cannot be rewritten as they stand, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from normswap.errors import CannotConvert, UnsupportedModel
from normswap.graph.modules import require_module
from normswap.graph.site import NormSite
from normswap.norms.start import Start
from normswap.norms.state import NormState
from normswap.swap.carry import moving_on

__all__ = ["refuse_taken_names", "refuse_unread", "refuse_unready", "refuse_unsupported"]

#: Wrappers by defining module and name, so that none is imported for the check.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise if the model is scripted, wrapped for ranks, or compiled, anywhere.

    Raises:
        UnsupportedModel: naming the place and what to do first.
    """
    require_module(model)
    wrappers = _loaded_wrappers()
    for path, module in model.named_modules():
        problem = _problem(module, wrappers)
        if problem:
            where = f"{path or 'the model'} ({type(module).__name__})"
            raise UnsupportedModel(f"{where} {problem}")


def _problem(module: nn.Module, wrappers: tuple[type, ...]) -> str:
    if isinstance(module, torch.jit.ScriptModule) and _holds_norms(module):
        return (
            "is a ScriptModule, whose layers cannot be replaced; convert the model it was made of"
        )
    if isinstance(module, wrappers):
        return (
            "is wrapped for several ranks, which has registered its parameters; "
            "convert first, then wrap"
        )
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return "is compiled, and its compiled code would be stale; convert first, then compile"
    return ""


def _holds_norms(scripted: torch.jit.ScriptModule) -> bool:
    """Whether a scripted module has a norm, by the names that its modules had before."""
    names = (getattr(module, "original_name", "") for module in scripted.modules())
    return any("Norm" in name for name in names)


def refuse_unready(site: NormSite) -> None:
    """Raise if a chosen site's module has no weights to speak of yet, or no longer.

    Raises:
        UnsupportedModel: naming the site and what to do first.
    """
    if site.unready:
        raise UnsupportedModel(f"{site.label}: {site.obstacle}")


def _loaded_wrappers() -> tuple[type, ...]:
    found = (getattr(sys.modules.get(where), name, None) for where, name in _WRAPPERS)
    return tuple(cls for cls in found if isinstance(cls, type))


def refuse_taken_names(state: NormState, start: Start) -> None:
    """Raise if a source calls a tensor as the new norm calls another one of its own.

    Raises:
        CannotConvert: both cannot stand under one key.
    """
    called = {held for name, held in state.names.items() if name != held}
    if not called:
        return
    shell = start.shell()
    taken = sorted(held for held in called if hasattr(shell, held))
    if taken:
        raise CannotConvert(
            f"it calls a tensor {taken[0]}, and so does {type(shell).__name__} one of its own",
            "leave it out by skip=, or give it another name first",
        )


def refuse_unread(reads: Mapping[str, str], old: nn.Module, state: NormState, start: Start) -> None:
    """Raise if a forward reads something of a norm that the new one would not have.

    Args:
        reads: what is read of it, and by whom.
        old: the norm.
        state: what was read from it.
        start: how the new one starts.

    Raises:
        CannotConvert: naming what is missing first.
    """
    needed = [name for name in reads if getattr(old, name, None) is not None]
    moving = moving_on(old) - set(state.own) if needed else set()
    there = {*start.affine, *start.running, *moving}
    needed = [name for name in needed if name not in there]
    shell = start.shell() if needed else None
    for name in needed:
        if not hasattr(shell, name):
            raise CannotConvert(
                f"the forward of {reads[name]} reads its {name}, and {type(shell).__name__} has "
                "none",
                "leave it out by skip=",
            )
