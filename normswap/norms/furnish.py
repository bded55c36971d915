"""Putting the tensors into a new norm's shell: the source's own where they are carried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.norms.renamed import whole
from normswap.norms.start import Start
from normswap.norms.state import AFFINE_TENSORS, NormState

__all__ = ["Furnished", "furnish"]


@dataclass(frozen=True)
class Furnished:
    """A complete new norm, with what is still to be done to tensors that the source also holds.

    Args:
        module: the new norm. It shares the source's tensors; nothing of theirs was touched.
        carried: names of the tensors that are the source's own.
        rewrites: new values for carried tensors, by name, to be written when the swap is made.
        requires_grad: flags for carried tensors, by name, to be set when the swap is made.
    """

    module: nn.Module
    carried: frozenset[str]
    rewrites: dict[str, Tensor]
    requires_grad: dict[str, bool]


def furnish(state: NormState, start: Start) -> Furnished:
    """Make the shell and give it weight, bias and running statistics.

    A carried tensor is the same object as in the source, so that optimizers, averaged copies and
    ties to it stay valid. What the source does not have is made on its device, in its dtype.
    """
    module = start.shell()
    values = dict(start.values())
    carried: set[str] = set()
    rewrites: dict[str, Tensor] = {}
    for name, make in state.within.items():
        if name in getattr(module, "tail", ()) and name not in module._modules:
            module.add_module(name, make())
    for name in AFFINE_TENSORS:
        own: Tensor | None = getattr(state, name) if name in start.affine else None
        if own is not None and own.shape != (state.num_features,):
            own = None
        value = values.pop(name, None)
        if own is not None:
            carried.add(name)
            if value is not None:
                rewrites[name] = value
        elif name in start.affine:
            own = _fresh(name, state) if value is None else value
        if name in start.affine or not hasattr(module, name):
            module.register_parameter(name, _parameter(own, frozen=start.frozen))
    for name in start.running:
        own = getattr(state, name) if state.tracks and not start.fresh else None
        if own is not None and state.retold:
            own = own.detach().clone()
        elif own is not None:
            carried.add(name)
        module.register_buffer(name, _fresh(name, state) if own is None else own)
    for name, value in (*values.items(), *start.kept().items()):
        _fill(module, name, value)
    for flag, setting in (
        ("affine", bool(start.affine)),
        ("elementwise_affine", bool(start.affine)),
        ("track_running_stats", bool(start.running)),
    ):
        if hasattr(module, flag):
            setattr(module, flag, setting)
    affine = [n for n in AFFINE_TENSORS if n in carried and _trains(getattr(state, n))]
    flags = {name: False if start.frozen else state.trainable.get(name) for name in affine}
    requires_grad = {name: flag for name, flag in flags.items() if flag is not None}
    return Furnished(module, frozenset(carried), rewrites, requires_grad)


def _trains(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(whole(tensor), nn.Parameter)


def _parameter(tensor: Tensor | None, *, frozen: bool) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=not frozen)


def _fresh(name: str, state: NormState) -> Tensor:
    """A tensor of a norm that has seen nothing: unit gain and variance, zero for the rest."""
    like = state.reference()
    if name == "num_batches_tracked":
        return torch.zeros((), dtype=torch.long, device=like.device)
    make = like.new_ones if name in ("weight", "running_var") else like.new_zeros
    return make(state.num_features)


def _fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a tensor that the shell has of its own its value, device and dtype included."""
    if name in module._parameters:
        module._parameters[name] = _parameter(value, frozen=False)
    else:
        module._buffers[name] = value
