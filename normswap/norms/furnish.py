"""Putting the tensors into a new norm's shell: the source's own where they are carried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["Furnished", "furnish"]

_AFFINE = ("weight", "bias")


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
    for name in _AFFINE:
        own: Tensor | None = getattr(state, name)
        if start.affine and own is not None:
            carried.add(name)
            if name in values:
                rewrites[name] = values[name]
        else:
            own = values.get(name) if start.affine else None
        module.register_parameter(name, _parameter(own, frozen=start.frozen))
    for name, buffer in _running(state, start).items():
        if buffer is not None and buffer is getattr(state, name):
            carried.add(name)
        module.register_buffer(name, buffer)
    for flag, value in (
        ("affine", start.affine),
        ("elementwise_affine", start.affine),
        ("track_running_stats", start.running),
    ):
        if hasattr(module, flag):
            setattr(module, flag, value)
    flags = {name: False if start.frozen else state.trainable.get(name) for name in carried}
    requires_grad = {
        name: flag for name, flag in flags.items() if flag is not None and name in _AFFINE
    }
    return Furnished(module, frozenset(carried), rewrites, requires_grad)


def _parameter(tensor: Tensor | None, *, frozen: bool) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=not frozen)


def _running(state: NormState, start: Start) -> dict[str, Tensor | None]:
    """The running statistics of the new norm; empty for a norm that has no such notion."""
    if not start.running:
        return {}
    if state.tracks and not start.fresh:
        counter = state.num_batches_tracked
        like = state.reference()
        return {
            "running_mean": state.running_mean,
            "running_var": state.running_var,
            "num_batches_tracked": _counter(like) if counter is None else counter,
        }
    like = state.reference()
    return {
        "running_mean": like.new_zeros(state.num_features),
        "running_var": like.new_ones(state.num_features),
        "num_batches_tracked": _counter(like),
    }


def _counter(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.long, device=like.device)
