"""BatchNorm folded into the convolution or linear beside it.

In eval mode BatchNorm is y = slope · x + offset per channel, with slope = weight / sqrt(var + eps)
and offset = bias - slope · mean. The layer whose output it reads takes both into its rows; failing
that, the layer that alone reads its output takes them into its columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normswap.errors import CannotConvert
from normswap.norms.base import place
from normswap.norms.beside import Look, Rewritten
from normswap.norms.entry import BATCH_SOURCES, NormEntry
from normswap.norms.fidelity import Fidelity
from normswap.norms.identity import Identity, read_identity
from normswap.norms.precision import precise
from normswap.norms.remake import why_not
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "Folded"]


class Folded(Identity):
    """Passes its input on, where a BatchNorm stood that its neighbour has taken in."""

    def normalize(self, x: Tensor) -> Tensor:
        """Hand on the input itself: nothing else reads it, or nothing behind writes to it."""
        return x


@dataclass(frozen=True)
class _Affine:
    """What a BatchNorm is in eval mode, in double precision."""

    slope: Tensor
    offset: Tensor


def start_fold(state: NormState, *, carry: Carry = "auto") -> Start:
    """Start a fold: the neighbour's weight and bias are rewritten, the norm is gone."""
    problem = state.obstacle
    if state.rule.eval.over != "running":
        problem = "it does not evaluate with running statistics, so it is no fixed affine to fold"
    if problem:
        raise CannotConvert(problem, "leave it out by skip=")
    into, takes = state.producer, _into_rows
    problem = why_not(into, transposed=True)
    if problem:
        after, takes = state.consumer, _into_columns
        other = why_not(after, transposed=True) or _padding(after.module)
        if state.tail:
            other = "an activation is fused into it"
        if other:
            raise CannotConvert(
                f"before it: {problem}; after it: {other}",
                "leave it out by skip=",
            )
        into, problem = after, ""

    def shell() -> nn.Module:
        return place(Folded(state.num_features, state.dim, state.reference()), state)

    module: Any = into.module
    return Start(
        fidelity=Fidelity.EVAL,
        shell=shell,
        affine=(),
        running=(),
        values=dict,
        note=f"into {into.path}",
        beside=(Rewritten(module, partial(takes, module, _affine(state))),),
    )


def _padding(module: nn.Module | None) -> str:
    """Zero padding would have to be padding by the offset, which no bias can give."""
    padding = getattr(module, "padding", 0)
    sizes = padding if isinstance(padding, tuple) else (padding,)
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution, whose borders see fewer inputs"
    return "a convolution with padding" if any(size not in (0, "valid") for size in sizes) else ""


def _affine(state: NormState) -> _Affine:
    if state.running_mean is None or state.running_var is None:
        raise CannotConvert("it keeps no running statistics", "leave it out by skip=")
    with torch.no_grad():
        pool, (gain, offset) = state.rule.eval, state.gain_and_offset()
        mean, var = pool.expected(precise(state.running_mean), precise(state.running_var))
        slope = gain / pool.divisor(var, state.eps)
        return _Affine(slope, offset - slope * mean)


def _into_rows(module: Any, affine: _Affine, look: Look) -> dict[str, Tensor]:
    """Weight and bias of the layer before, which scales its output channels."""
    weight, bias = look(module, "weight"), look(module, "bias")
    rows = _rows(module, affine.slope, weight.ndim)
    offset = affine.offset if bias is None else affine.offset + affine.slope * bias.double()
    return _written(weight, weight.double() * rows, offset)


def _rows(module: Any, slope: Tensor, ndim: int) -> Tensor:
    """A factor for each output channel, shaped to multiply the layer's weight."""
    if not isinstance(module, _ConvTransposeNd):
        return slope.view(-1, *[1] * (ndim - 1))
    # (in, out / groups, ...): the rows of a group's inputs hold that group's outputs
    per_group = slope.view(module.groups, 1, -1)
    repeats = module.in_channels // module.groups
    return per_group.expand(-1, repeats, -1).reshape(module.in_channels, -1, *[1] * (ndim - 2))


def _into_columns(module: Any, affine: _Affine, look: Look) -> dict[str, Tensor]:
    """Weight and bias of the layer after, which scales its input channels."""
    weight, bias = look(module, "weight"), look(module, "bias")
    groups = getattr(module, "groups", 1)
    shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
    grouped = weight.double().view(groups, -1, *weight.shape[1:])
    gained = (grouped * affine.offset.view(shape)).flatten(2).sum(2).flatten()
    offset = gained if bias is None else gained + bias.double()
    scaled = (grouped * affine.slope.view(shape)).view(weight.shape)
    return _written(weight, scaled, offset)


def _written(like: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {"weight": weight.to(like.dtype), "bias": bias.to(like.dtype)}


def read_folded(module: nn.Module) -> NormState:
    """Read what is left of a folded norm: nothing that another could start from."""
    return replace(
        read_identity(module),
        norm="fold",
        obstacle="it was folded into its neighbour; call normswap.revert first",
    )


ENTRIES = (
    NormEntry(
        name="fold",
        aliases=("fold_bn", "fuse"),
        kind="identity",
        axis="none",
        pooled="nothing: running statistics, in the neighbour's weights",
        paper="",
        sources=BATCH_SOURCES,
        start=start_fold,
        reads={Folded: read_folded},
        needs=frozenset({"neighbours"}),
    ),
)
