"""Statistics of groups, of the statistics of their parts.

On small maps a norm by a rule spends its time on many small operations. Pooling is the one that
every rule has, some twice, so that its gradient is written by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.norms.moments import should_be_plain

__all__ = ["pooled"]


def pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all values along a dimension of (N, C).

    Over samples with ``dim=0``, which leaves (C,). Over channels with 1, and the dimension stays
    as one; groups of channels are made before, by ``unflatten(1, (groups, -1))`` and ``dim=2``.
    It is the mean of the variances and the variance of the means, where every sample's channel has
    as many positions. Differentiable twice.
    """
    if should_be_plain():
        return _pooled(mean, var, dim)
    centre, spread = _Pool.apply(mean, var, dim)
    return centre, spread


def _pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    stays = dim > 0
    centre = mean.mean(dim, keepdim=stays)
    away = mean - centre
    return centre, torch.addcmul(var, away, away).mean(dim, keepdim=stays)


class _Pool(torch.autograd.Function):
    """mean, var -> centre, spread, along a dimension."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        centre, spread = _pooled(mean, var, dim)
        ctx.save_for_backward(mean, centre)
        ctx.count = mean.shape[dim]
        return centre, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, centre = ctx.saved_tensors
        shift, share = (grad / ctx.count for grad in grads)
        dmean = torch.addcmul(shift, mean - centre, share, value=2)
        return dmean, share.expand_as(mean), None
