"""Normalizing by per-channel statistics of each sample, with the least traffic.

Most norms are y[n,c,·] = gain[n,c]·x[n,c,·] + offset[n,c], where gain and offset follow from the
mean and variance of every sample's channel by arithmetic on (N, C) tensors. `normalized` does
the passes over x, and leaves that arithmetic, the norm's rule, to plain torch and its autograd.

Forward is two passes over x: the moments, then the output. Backward is two over x and dy: the
gradients of gain and offset, then dx = gain·dy + slope·x + shift, whose last two terms are what
comes back through mean and variance. Only x and (N, C) tensors are kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normswap.norms.passes import (
    beside,
    channel_sums,
    combined,
    matching,
    moments,
    scaled,
    work_dtype,
)

__all__ = ["Rule", "normalized", "should_be_plain"]

#: ``rule(mean, var) -> (gain, offset)``: of means and biased variances, (N, C) each, what (N, C)
#: is expanded to.
Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def normalized(x: Tensor, rule: Rule) -> Tensor:
    """gain·x + offset with what a rule makes of the mean and variance of every sample's channel.

    Differentiable twice, in x and in whatever the rule uses. Under `torch.compile` it is the
    plain formula, for the compiler to fuse.

    Args:
        x: (N, C, *), floating point, of any size: empty batches and single positions too.
        rule: gets mean and biased variance, (N, C) each, in float32 or, for a float64 input,
            float64. What it returns may be of any shape that expands to (N, C).

    Returns:
        Of the shape, dtype and, where it is contiguous or channels-last, memory format of x.
    """
    if should_be_plain():
        mean, var = _plain_moments(x)
        return _plain_scaled(x, *_expanded(rule(mean, var), mean))
    if not (x.requires_grad and torch.is_grad_enabled()):
        mean, var = moments(x.detach())
        gain, offset = _expanded(rule(mean, var), mean)
        y: Tensor = _Scale.apply(x, gain, offset, mean, None)
        return y
    passed, mean, var = _Measure.apply(x)
    gain, offset = _expanded(rule(mean, var), mean)
    y = _Scale.apply(passed, gain, offset, None, passed.grad_fn)
    return y


class _Measure(torch.autograd.Function):
    """x -> x, mean, var.

    The gradient of the first output is `_Scale`'s, which does not multiply it out: it leaves dy
    as it is, and a note of what it is to be multiplied by, so that dx is made in one pass here.
    Every way from a loss to mean and var leads through `_Scale`, so the note is there in time.

    With ``create_graph=True`` nothing is left to be multiplied, and all is plain formulas, which
    autograd can follow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = moments(x)
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        ctx.note = None
        return x, mean, var

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None
    ) -> Tensor | None:
        note, ctx.note = ctx.note, None
        # Saved tensors are unpacked once a pass: checkpointing allows no more.
        x, mean, gain = (*ctx.saved_tensors, None) if dy is None else note
        length = max(x[0, 0].numel() if x.numel() else 1, 1)
        slope = torch.zeros_like(mean) if dvar is None else dvar * (2 / length)
        if torch.is_grad_enabled():
            dx: Tensor = beside(slope, x) * (x - beside(mean, x))
            dx = dx if dmean is None else dx + beside(dmean / length, x)
            return dx.to(x.dtype) if dy is None else dy + dx.to(x.dtype)
        shift = slope.mul(mean).neg_() if dmean is None else dmean / length - slope * mean
        if dy is None:
            return scaled(x, slope, shift)
        return combined(dy, x, gain, slope, shift)


class _Scale(torch.autograd.Function):
    """x, gain, offset -> gain·x + offset.

    Args:
        mean: of every sample's channel, where x takes no gradient.
        measured: the `_Measure` that x comes from, where it does, and which has x and mean.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, mean: Tensor | None, measured: Any
    ) -> Tensor:
        ctx.measured = measured
        ctx.save_for_backward(gain, *(() if mean is None else (x, mean)))
        return scaled(x, gain, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gain, *kept = ctx.saved_tensors
        x, mean = kept or ctx.measured.saved_tensors
        dy = grads[0]
        if torch.is_grad_enabled():
            values = dy.to(gain.dtype)
            positions = tuple(range(2, x.ndim))
            dgain = (values * x).sum(positions) if positions else values * x
            doffset = values.sum(positions) if positions else values
            dx = (values * beside(gain, x)).to(x.dtype)
        else:
            dx = matching(dy, x)
            centred, doffset = channel_sums(dx, x, mean)
            dgain = centred.addcmul_(mean, doffset)
        if ctx.measured is not None:
            ctx.measured.note = (x, mean, gain)
        return dx if ctx.measured is not None else None, dgain, doffset, None, None


def should_be_plain() -> bool:
    """Whether something looks at the operations one by one: a compiler, or torch.func."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.to(work_dtype(x))
    if x.ndim == 2:
        return values, torch.zeros_like(values)
    positions = tuple(range(2, x.ndim))
    mean = values.mean(positions)
    return mean, (values - beside(mean, x)).square().mean(positions)


def _plain_scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return (x * beside(gain, x) + beside(offset, x)).to(x.dtype)


def _expanded(made: tuple[Tensor, Tensor], mean: Tensor) -> tuple[Tensor, Tensor]:
    gain, offset = made
    return gain.to(mean.dtype).expand_as(mean), offset.to(mean.dtype).expand_as(mean)
