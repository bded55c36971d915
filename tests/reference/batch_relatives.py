"""The formulas of norms that are batch normalization with one thing changed."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.formulas import (
    Running,
    mean_and_unbiased_var,
    moments,
    per_channel,
    position_dims,
    scaled,
)


def extended_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Luo et al. 2020: each channel's mean over the batch, one deviation for all channels."""
    mean, var = _over_batch(x, running, training, momentum)
    return scaled((x - mean) / (var.mean() + eps) ** 0.5, weight, bias)


def batch_channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    group_weight: Tensor,
    group_bias: Tensor,
    *,
    groups: int,
    estimated: bool = False,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Qiao et al. 2019: each channel over the batch, then groups of each sample.

    By estimate the first goes by what is kept, which has followed this batch.
    """
    if training and estimated:
        old = per_channel(running.mean, x)
        dims = (0, *position_dims(x))
        values = x.numel() // x.shape[1]
        square = ((x - old) ** 2).sum(dims) / values
        running.update(x.sum(dims) / values, square, momentum)
        mean, var = per_channel(running.mean, x), per_channel(running.var, x)
    else:
        mean, var = _over_batch(x, running, training, momentum)
    z = scaled((x - mean) / (var + eps) ** 0.5, weight, bias)
    grouped = z.reshape(len(x), groups, -1)
    mean, var = moments(grouped, (2,))
    y = (grouped - mean) / (var + eps) ** 0.5 * group_weight[:, None] + group_bias[:, None]
    return y.reshape(x.shape)


def batch_instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    *,
    gate: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Nam and Kim 2018: a blend of both, by a gate that training keeps between 0 and 1."""
    mean, var = _over_batch(x, running, training, momentum)
    of_batch = (x - mean) / (var + eps) ** 0.5
    mean, var = _of_samples(x)
    of_sample = (x - mean) / (var + eps) ** 0.5
    if training:  # put back in place: the gradient knows nothing of it
        gate = gate + (gate.clamp(0, 1) - gate).detach()
    share = per_channel(gate, x)
    return scaled(share * of_batch + (1 - share) * of_sample, weight, bias)


def instance_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    first: int,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Pan et al. 2018: the first channels by instance, the others by batch normalization."""
    mean, var = _over_batch(x, running, training, momentum)
    of_batch = (x - mean) / (var + eps) ** 0.5
    mean, var = _of_samples(x)
    of_sample = (x - mean) / (var + eps) ** 0.5
    return scaled(torch.cat([of_sample[:, :first], of_batch[:, first:]], 1), weight, bias)


def adaptive_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    *,
    input_weight: Tensor,
    norm_weight: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Chen et al. 2017: a sum of the input and its batch normalization."""
    mean, var = _over_batch(x, running, training, momentum)
    y = scaled((x - mean) / (var + eps) ** 0.5, weight, bias)
    return input_weight * x + norm_weight * y


def instance_enhancement_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    *,
    gate_weight: Tensor,
    gate_bias: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Liang et al. 2020: a gain by the mean of the sample's channel."""
    mean, var = _over_batch(x, running, training, momentum)
    own, _ = _of_samples(x)
    gate = torch.sigmoid(per_channel(gate_weight, x) * own + per_channel(gate_bias, x))
    return scaled((x - mean) / (var + eps) ** 0.5 * gate, weight, bias)


def _over_batch(
    x: Tensor, running: Running, training: bool, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of the batch, or what is kept of it."""
    if not training:
        return per_channel(running.mean, x), per_channel(running.var, x)
    running.update(*mean_and_unbiased_var(x), momentum)
    return moments(x, (0, *position_dims(x)))


def _of_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every sample's channel; without positions it is one value."""
    return moments(x, position_dims(x)) if x.ndim > 2 else (x, torch.zeros_like(x))
