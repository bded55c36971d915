"""Statistics in a norm's own terms, where it does not divide by the plain variance.

A norm by a rule may take each sample's variances as unbiased before it pools them, and keep what
comes of it as it is. A statistics pass over all data has to find that, not what torch would keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normswap.graph.site import NormSite
from normswap.norms.measured import MeasuredNorm
from normswap.stats.accumulate import Batch, precise

__all__ = ["as_kept", "in_own_terms", "width"]


def width(site: NormSite) -> int:
    """How many channels `in_own_terms` makes: the norm's, and one that tells what it keeps."""
    return site.num_features + isinstance(site.module, MeasuredNorm)


def in_own_terms(site: NormSite, x: Tensor, batch: Batch) -> Batch:
    """What a norm would measure of an input, such that batches pool to what it measures of all.

    Args:
        site: the norm.
        x: its input.
        batch: the plain statistics of x, in double precision.

    Returns:
        The same for most norms. That of a norm by a rule has one more channel without variance,
        whose mean is 1 where the norm keeps the very variance that it divides by, and 0 where it
        keeps the unbiased one: like all else it is pooled, merged over ranks and bookmarked.
    """
    if not isinstance(site.module, MeasuredNorm):
        return batch
    rows = x.detach().movedim(site.channel_dim, 1).unsqueeze(-1).flatten(2)
    factor = site.module.within(rows.shape[2])
    var = batch.var
    if factor != 1:
        means = precise(rows.mean(2, dtype=torch.promote_types(x.dtype, torch.float32)))
        bessel = batch.count / (batch.count - 1)
        between = means.var(0, correction=0) * bessel
        var = between + (var - between).clamp(min=0) * factor
    tells = batch.mean.new_tensor([float(factor != 1)])
    return Batch(
        batch.count,
        batch.samples,
        torch.cat([batch.mean, tells]),
        torch.cat([var, torch.zeros_like(tells)]),
    )


def as_kept(site: NormSite, weight: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of all values, such that the norm keeps its quotient.

    Args:
        site: the norm.
        weight: how many values there are.
        mean: of `width` channels.
        spread: likewise.

    Returns:
        Both of (C,): divided by ``weight - 1``, the second is what training would keep.
    """
    if not isinstance(site.module, MeasuredNorm):
        return mean, spread
    fewer = weight - 1
    return mean[:-1], spread[:-1] * (fewer / (fewer + mean[-1]).clamp(min=1))
