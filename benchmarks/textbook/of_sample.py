"""Norms of each sample by itself: over its groups, channels, positions or windows, or of values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import (
    CHANNEL,
    POSITION,
    SAMPLE,
    Formula,
    affine,
    beside,
    by_group,
    in_groups,
    moments,
    standardized,
)


def group_norm(x: Tensor, norm: Any) -> Tensor:
    """Wu and He 2018."""
    return affine(by_group(x, norm.num_groups, norm), norm)


def instance_norm(x: Tensor, norm: Any) -> Tensor:
    """Ulyanov et al. 2016."""
    return affine(standardized(x, *moments(x, CHANNEL), norm), norm)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    """Ba et al. 2016, over a sample's map."""
    return affine(standardized(x, *moments(x, SAMPLE), norm), norm)


def layer_norm_2d(x: Tensor, norm: Any) -> Tensor:
    """Liu et al. 2022, over the channels at each position."""
    return affine(standardized(x, *moments(x, POSITION), norm), norm)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Zhang and Sennrich 2019, over a sample's map."""
    return affine(x / (x.square().mean(SAMPLE, keepdim=True) + norm.eps).sqrt(), norm)


def rms_norm_2d(x: Tensor, norm: Any) -> Tensor:
    """Zhang and Sennrich 2019, over the channels at each position."""
    return affine(x / (x.square().mean(POSITION, keepdim=True) + norm.eps).sqrt(), norm)


def channel_norm(x: Tensor, norm: Any) -> Tensor:
    """Dai and Heckel 2019: the unbiased variance."""
    return affine(standardized(x, *moments(x, CHANNEL, int(norm.unbiased)), norm), norm)


def filter_response_norm(x: Tensor, norm: Any) -> Tensor:
    """Singh and Krishnan 2020, without its activation."""
    return affine(x / (x.square().mean(CHANNEL, keepdim=True) + norm.eps).sqrt(), norm)


def evolved_norm_s0(x: Tensor, norm: Any) -> Tensor:
    """Liu et al. 2020, EvoNorm-S0: a swish of each value by its group's deviation."""
    grouped = in_groups(x, norm.num_groups)
    std = (grouped.var((2, 3, 4), keepdim=True, correction=0) + norm.eps).sqrt()
    swish = in_groups(x * (beside(norm.v) * x).sigmoid(), norm.num_groups)
    return affine((swish / std).flatten(1, 2), norm)


def local_context_norm(x: Tensor, norm: Any) -> Tensor:
    """Ortiz et al. 2020: means over windows as pooling makes them, one for each position."""
    sizes = [min(norm.window, length) for length in x.shape[2:]]
    rows, columns = (
        (torch.arange(length) - (size - 1) // 2).clamp(0, length - size)
        for length, size in zip(x.shape[2:], sizes, strict=True)
    )
    groups = norm.num_features // norm.channels_per_group

    def around(values: Tensor) -> Tensor:
        windows = F.avg_pool2d(in_groups(values, groups).mean(2), sizes, stride=1)
        return windows[:, :, rows][:, :, :, columns].repeat_interleave(norm.channels_per_group, 1)

    mean = around(x)
    return affine(standardized(x, mean, around(x.square()) - mean.square(), norm), norm)


def scale_norm(x: Tensor, norm: Any) -> Tensor:
    """Nguyen and Salazar 2019: one length for every position's channels."""
    length = x.square().sum(POSITION, keepdim=True).sqrt()
    return affine(norm.scale * x / length.clamp(min=norm.eps), norm)


def dynamic_tanh(x: Tensor, norm: Any) -> Tensor:
    """Zhu et al. 2025."""
    return affine((norm.alpha * x).tanh(), norm)


def dynamic_erf(x: Tensor, norm: Any) -> Tensor:
    """Chen et al. 2025."""
    return affine((norm.alpha * x + norm.shift).erf(), norm)


FORMULAS: dict[str, Formula] = {
    "gn": group_norm,
    "in": instance_norm,
    "ln": layer_norm,
    "ln2d": layer_norm_2d,
    "rms": rms_norm,
    "rms2d": rms_norm_2d,
    "cn": channel_norm,
    "frn": filter_response_norm,
    "evonorm_s0": evolved_norm_s0,
    "lcn": local_context_norm,
    "scale_norm": scale_norm,
    "dyt": dynamic_tanh,
    "derf": dynamic_erf,
}
