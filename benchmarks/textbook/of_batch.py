"""Norms by statistics of the batch, and what mixes or changes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .parts import (
    BATCH,
    CHANNEL,
    Formula,
    affine,
    beside,
    by_group,
    follow,
    moments,
    over_batch,
    standardized,
)


def batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Ioffe and Szegedy 2015."""
    return affine(standardized(x, *over_batch(x, norm), norm), norm)


def frozen_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Batch normalization by running statistics, with nothing that learns."""
    z = standardized(x, beside(norm.running_mean), beside(norm.running_var), norm)
    return z * beside(norm.weight.detach()) + beside(norm.bias.detach())


def ghost_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Hoffer et al. 2017: the batch in parts."""
    parts = x.chunk(math.ceil(len(x) / norm.group_size))
    statistics = [moments(part, BATCH) for part in parts]
    sizes = [part.numel() / part.shape[1] for part in parts]
    unbiased = [v * n / (n - 1) for (_, v), n in zip(statistics, sizes, strict=True)]
    follow(
        norm,
        running_mean=torch.stack([mean for mean, _ in statistics]).mean(0),
        running_var=torch.stack(unbiased).mean(0),
    )
    z = [standardized(part, *own, norm) for part, own in zip(parts, statistics, strict=True)]
    return affine(torch.cat(z), norm)


def l1_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Wu et al. 2018: the mean absolute deviation."""
    mean = x.mean(BATCH, keepdim=True)
    scale = math.sqrt(math.pi / 2) * (x - mean).abs().mean(BATCH, keepdim=True)
    follow(norm, running_mean=mean, running_scale=scale)
    return affine((x - mean) / (scale + norm.eps), norm)


def extended_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Luo et al. 2020: one variance for all channels."""
    mean, var = over_batch(x, norm)
    return affine(standardized(x, mean, var.mean(), norm), norm)


def batch_instance_norm(x: Tensor, norm: Any) -> Tensor:
    """Nam and Kim 2018: a blend of two standardized maps."""
    with torch.no_grad():
        norm.gate.clamp_(0, 1)
    of_batch = standardized(x, *over_batch(x, norm), norm)
    of_sample = standardized(x, *moments(x, CHANNEL), norm)
    gate = beside(norm.gate)
    return affine(gate * of_batch + (1 - gate) * of_sample, norm)


def instance_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Pan et al. 2018: some channels by instance, the others by batch."""
    first = norm.by_instance
    mean, var = over_batch(x, norm)
    ours, others = x[:, :first], x[:, first:]
    of_sample = standardized(ours, *moments(ours, CHANNEL), norm)
    of_batch = standardized(others, mean[:, first:], var[:, first:], norm)
    return affine(torch.cat([of_sample, of_batch], 1), norm)


def adaptive_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Chen et al. 2017: the input and its batch normalization."""
    return norm.input_weight * x + norm.norm_weight * batch_norm(x, norm)


def instance_enhancement_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Liang et al. 2020: a gain by each sample's channel."""
    own = x.mean(CHANNEL, keepdim=True)
    gate = (beside(norm.gate_weight) * own + beside(norm.gate_bias)).sigmoid()
    return affine(standardized(x, *over_batch(x, norm), norm) * gate, norm)


def attentive_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Li et al. 2020, with batch normalization in the attention: a mixture of affines."""
    mean, var = moments(x, CHANNEL, 1)
    features = (mean / (var + 1e-3).sqrt()).flatten(1) @ norm.attention_weight.mT
    centre, spread = features.mean(0), features.var(0, correction=0)
    with torch.no_grad():
        norm.attention_mean.lerp_(centre, norm.momentum)
        norm.attention_var.lerp_(spread * len(x) / (len(x) - 1), norm.momentum)
    features = (features - centre) / (spread + 1e-5).sqrt()
    features = features * norm.attention_gain + norm.attention_bias
    shares = 2 / norm.num_mixtures * (features + 3).clamp(0, 6) / 6
    gain = beside(shares @ (norm.weight + norm.weight_delta))
    offset = beside(shares @ (norm.bias + norm.bias_delta))
    return standardized(x, *over_batch(x, norm), norm) * gain + offset


def transferable_norm(x: Tensor, norm: Any) -> Tensor:
    """Wang et al. 2019: two halves, and more weight for channels in which they agree."""
    halves = x[: len(x) // 2], x[len(x) // 2 :]
    source, target = (moments(half, BATCH) for half in halves)
    (source_mean, source_var), (target_mean, target_var) = (moments(h, BATCH, 1) for h in halves)
    with torch.no_grad():
        one, other = source_mean / (source_var + norm.eps).sqrt(), target_mean
        near = 1 / (1 + (one - other / (target_var + norm.eps).sqrt()).abs())
        more = 1 + near / near.mean()
    follow(
        norm,
        running_mean_source=source_mean,
        running_var_source=source_var,
        running_mean_target=target_mean,
        running_var_target=target_var,
    )
    z = [standardized(half, *own, norm) for half, own in zip(halves, (source, target), strict=True)]
    return affine(torch.cat(z), norm) * more


def batch_renorm(x: Tensor, norm: Any) -> Tensor:
    """Ioffe 2017: corrected towards what is kept, within limits that widen with the steps."""
    mean, var = moments(x, BATCH)
    std = (var + norm.eps).sqrt()
    with torch.no_grad():
        beyond = int(norm.num_batches_tracked) - 5000
        r_max = min(max(1 + 2 * beyond / 35_000, 1), 3) if norm.r_max is None else norm.r_max
        d_max = min(max(5 * beyond / 20_000, 0), 5) if norm.d_max is None else norm.d_max
        kept_mean, kept_std = beside(norm.running_mean), beside(norm.running_std)
        r = (std / kept_std).clamp(1 / r_max, r_max)
        d = ((mean - kept_mean) / kept_std).clamp(-d_max, d_max)
    follow(norm, running_mean=mean, running_std=std)
    return affine((x - mean) / std * r + d, norm)


def batch_channel_norm(x: Tensor, norm: Any) -> Tensor:
    """Qiao et al. 2019: batch normalization, then groups, with a second gain and offset."""
    z = by_group(batch_norm(x, norm), norm.num_groups, norm)
    size = x.shape[1] // norm.num_groups
    gain, offset = (t.repeat_interleave(size) for t in (norm.group_weight, norm.group_bias))
    return z * beside(gain) + beside(offset)


def evolved_norm_b0(x: Tensor, norm: Any) -> Tensor:
    """Liu et al. 2020, EvoNorm-B0: the larger of two deviations; no number of values corrects."""
    var = x.var(BATCH, keepdim=True, correction=0)
    own = x.var(CHANNEL, keepdim=True, correction=0)
    follow(norm, running_var=var)
    divisor = torch.maximum((var + norm.eps).sqrt(), beside(norm.v) * x + (own + norm.eps).sqrt())
    return affine(x / divisor, norm)


FORMULAS: dict[str, Formula] = {
    "bn": batch_norm,
    "sync_bn": batch_norm,
    "frozen_bn": frozen_batch_norm,
    "ghost_bn": ghost_batch_norm,
    "l1_bn": l1_batch_norm,
    "ebn": extended_batch_norm,
    "bin": batch_instance_norm,
    "ibn": instance_batch_norm,
    "adaptive_bn": adaptive_batch_norm,
    "iebn": instance_enhancement_batch_norm,
    "an": attentive_batch_norm,
    "transnorm": transferable_norm,
    "batch_renorm": batch_renorm,
    "bcn": batch_channel_norm,
    "kalman": batch_norm,  # of a layer that no other has told what to expect
    "evonorm_b0": evolved_norm_b0,
}
