"""Norms that divide by a mean square over the batch, and whose backward goes by estimates.

Their gradient is not that of what they compute. What the mean square of the batch would do in it
is (dz · z) on the mean over the batch, times z. They put in its place what they know of that mean
from this step and from earlier ones: backward measures, and keeps, as forward does.

So each forward in training asks for one backward, at once or later: a second one through the same
forward is counted twice, as is the recomputation of checkpointing, and one that never comes is
missed. There are no derivatives of second order.

`torch.compile` makes one graph of it. Left to itself it computes small things once more in
backward, from buffers that forward has written to by then; `settled` is what it may not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normswap.norms.affine_norm import per_channel
from normswap.norms.pool import RUNNING, Pool, Rule
from normswap.norms.tracked import TrackedNorm

__all__ = ["MeanSquare", "MeanSquareNorm", "settled"]

#: What is kept of backward, and how to go by it: see `MeanSquareNorm.divided`.
Estimate = Callable[..., Tensor]


@torch.library.custom_op("normswap::settled", mutates_args=())
def _settled(x: Tensor) -> Tensor:
    return x.clone()


@_settled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def settled(x: Tensor) -> Tensor:
    """x, which a compiler computes in forward only: no other operation of torch promises that."""
    if not torch.compiler.is_compiling():
        return x
    y: Tensor = _settled(x)
    return y


@dataclass(frozen=True)
class MeanSquare(Pool):
    """The mean square of each channel, of the batch or as it was kept."""

    centred: bool = False

    def expected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel's mean square."""
        return torch.zeros_like(mean), var + mean.square()


class MeanSquareNorm(TrackedNorm):
    """weight · x / sqrt(φ + eps) + bias, where φ is by the batch in training.

    Args:
        num_features: C.
        **rest: as for `TrackedNorm`; eps is added to the mean square.

    Attributes:
        running_square: (C,), φ in eval mode; starts at 1.
    """

    running_square: Tensor

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.register_buffer("running_square", torch.ones(num_features))

    def by_kept(self, x: Tensor) -> Tensor:
        """x by the root of what was kept."""
        return x * per_channel((self.running_square.to(x.dtype) + self.eps).rsqrt(), x)

    @torch.no_grad()
    def square(self, x: Tensor) -> Tensor:
        """The mean square of each channel over the batch, (C,).

        Raises:
            DegeneratePooling: there is a single value for each channel.
        """
        return self.over_ranks(_mean(x.square()), x.numel() // self.num_features)

    def divided(
        self, x: Tensor, forward: Tensor, backward: Tensor, estimate: Estimate, *told: Tensor
    ) -> Tensor:
        """z = forward · x, whose gradient is backward · (dz - s · z).

        Args:
            x: (N, C, ...).
            forward: (C,).
            backward: (C,).
            estimate: ``estimate(product, *told)`` gives s, (C,), of the mean of dz · z over the
                batch. It is called in every backward, and may write to buffers.
            told: tensors of this forward.
        """
        merge = self.over_all if self.pools_ranks else None
        known = [settled(each) for each in (forward, backward)]
        z: Tensor = _Divide.apply(x, *known, estimate, merge, *(settled(each) for each in told))
        return z

    def retold(self) -> dict[str, Any]:
        """It evaluates as a batch norm whose running mean is zero."""
        square = self.running_square.detach()
        return {
            "rule": Rule(self.pools(tracks=False).train, RUNNING),
            "running_mean": torch.zeros_like(square),
            "running_var": square,
        }


class _Divide(torch.autograd.Function):
    """See `MeanSquareNorm.divided`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Tensor,
        backward: Tensor,
        estimate: Estimate,
        merge: Callable[[Tensor, int], Tensor] | None,
        *told: Tensor,
    ) -> Tensor:
        z = x * per_channel(forward, x)
        ctx.save_for_backward(z, backward, *told)
        ctx.estimate, ctx.merge = estimate, merge
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, backward, *told = ctx.saved_tensors
        product = _mean(dz * z)
        if ctx.merge is not None:
            product = ctx.merge(product, z.numel() // z.shape[1])
        slope = ctx.estimate(product, *told)
        dx = (dz - per_channel(slope, z) * z) * per_channel(backward, z)
        return (dx, None, None, None, None, *(None for _ in told))


def _mean(x: Tensor) -> Tensor:
    """Mean of each channel over all else, zero where there is nothing."""
    count = x.numel() // x.shape[1]
    return x.sum([0, *range(2, x.ndim)]) / max(count, 1)
