"""Statistics over all ranks: one collective in forward, one in backward, on any backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normswap.errors import DegeneratePooling

__all__ = ["merged", "merged_each", "ranks", "synchronized_batch_norm"]

Group = Any  # torch.distributed.ProcessGroup exists only where torch was built with distributed


def ranks(group: Group | None) -> int:
    """How many ranks share the statistics: 1 without an initialised process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def synchronized_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    factor: float,
    eps: float,
    group: Group | None,
    name: str = "batch norm",
) -> Tensor:
    """Normalize x by the mean and variance of its channels over the batches of all ranks.

    Counts, means and second moments are merged by Chan's rule, so uneven batches and ranks with
    an empty batch are exact; gradients are those of one process on the whole batch (the gradients
    of weight and bias are this rank's share, as in `torch.nn.SyncBatchNorm`).

    Args:
        x: (N, C, ...) with N = 0 allowed, floating point.
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        running_mean: (C,), updated in place, or ``None``.
        running_var: (C,), updated in place with the unbiased variance, or ``None``.
        factor: weight of this batch in the running statistics.
        eps: added to the variance.
        group: the process group, ``None`` for the default one.
        name: what an error calls the layer.

    Raises:
        DegeneratePooling: all ranks together hold at most one value per channel.
    """
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = values.numel() // values.shape[1]
    local_mean = values.sum(dims) / max(count, 1)
    local_m2 = (values - local_mean.view(shape)).square().sum(dims)

    mean, var, total = merged(count, local_mean, local_m2, group=group, name=name)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), factor)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), factor)

    scale = (var + eps).rsqrt().to(values.dtype)
    if weight is not None:
        scale = scale * weight
    y = (values - mean.to(values.dtype).view(shape)) * scale.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    normalized: Tensor = y.to(x.dtype)
    return normalized


def merged(
    count: int, mean: Tensor, m2: Tensor, *, group: Group | None, name: str
) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and number of all ranks' values, by Chan's rule in float64.

    Args:
        count: how many values this rank has for each channel, 0 allowed.
        mean: their mean, (C,).
        m2: the sum of their squared differences from it, (C,).
        group: the process group, ``None`` for the default one.
        name: what an error calls the layer.

    Raises:
        DegeneratePooling: all ranks together hold at most one value per channel.
    """
    counts = mean.new_full((1,), count, dtype=torch.float64)
    whole, var, totals = merged_each(counts, mean[None], m2[None], group=group)
    total = int(totals.item())
    if total <= 1:
        raise DegeneratePooling(
            f"{name}: expected more than one value per channel over all ranks in training, got "
            f"{total}; use a larger batch"
        )
    return whole[0], var[0], total


def merged_each(
    counts: Tensor, means: Tensor, m2s: Tensor, *, group: Group | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all ranks' values, for each of several sets.

    Args:
        counts: how many values this rank has for each channel in each set, (G,), in float64; in
            float32 a count would be rounded from 2**24 on.
        means: their means, (G, C).
        m2s: the sums of their squared differences from these, (G, C).
        group: the process group, ``None`` for the default one.

    Returns:
        Two tensors (G, C) and one (G,), in float64. Where a set has no values at all, zeros.
    """
    packed = torch.cat([counts[:, None], means.double(), m2s.double()], 1)
    rows = _AllGather.apply(packed.reshape(-1), group).view(-1, *packed.shape)
    counts, means, m2s = rows.split([1, means.shape[1], means.shape[1]], dim=2)
    totals = counts.sum(0)
    some = totals.clamp(min=1)
    whole = (counts * means).sum(0) / some
    var = (m2s + counts * (means - whole).square()).sum(0) / some
    return whole, var, totals.squeeze(1)


class _AllGather(torch.autograd.Function):
    """(K,) on each rank -> (ranks, K) on every rank; its gradient is a `_ReduceScatter`."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row.contiguous(), group=group)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """(ranks, K) on each rank -> this rank's row of their sum; its gradient is an `_AllGather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        total = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grads[0], ctx.group), None
