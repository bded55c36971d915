"""The norms' formulas as their papers give them, in plain tensor arithmetic.

Nothing here uses ``torch.nn`` norms or the package under test. Inputs are (N, C, ...) unless said
otherwise, variances are biased where they divide and unbiased where they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Running:
    """Running statistics (C,), and how many batches they have seen."""

    mean: Tensor
    var: Tensor
    batches: int = 0

    @classmethod
    def fresh(cls, num_features: int) -> Running:
        """Mean 0 and variance 1, in double precision."""
        return cls(
            torch.zeros(num_features, dtype=torch.float64),
            torch.ones(num_features, dtype=torch.float64),
        )

    def update(self, mean: Tensor, unbiased_var: Tensor, momentum: float | None) -> None:
        """new = (1 - a)·old + a·batch, where momentum ``None`` is a = 1/(batches seen)."""
        self.batches += 1
        weight = 1 / self.batches if momentum is None else momentum
        self.mean = (1 - weight) * self.mean + weight * mean.detach()
        self.var = (1 - weight) * self.var + weight * unbiased_var.detach()


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ioffe and Szegedy 2015, train mode: over samples and positions, per channel."""
    dims = (0, *position_dims(x))
    mean, var = moments(x, dims)
    if running is not None:
        values = x.numel() // x.shape[1]
        running.update(mean.flatten(), var.flatten() * values / (values - 1), momentum)
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def ghost_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: Running, size: int, *, eps: float = 1e-5
) -> Tensor:
    """Hoffer et al. 2017 with parts of ``size`` samples, and statistics averaged over the parts."""
    parts = [x[first : first + size] for first in range(0, len(x), size)]
    kept = [Running.fresh(x.shape[1]) for _ in parts]
    y = [
        batch_norm(part, weight, bias, own, momentum=1.0, eps=eps)
        for part, own in zip(parts, kept, strict=True)
    ]
    mean = sum(own.mean for own in kept) / len(kept)
    running.update(mean, sum(own.var for own in kept) / len(kept), 0.1)
    return torch.cat(y)


def fixed_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: Running, *, eps: float = 1e-5
) -> Tensor:
    """Batch normalization in eval mode, or frozen: by the running statistics."""
    mean, var = per_channel(running.mean, x), per_channel(running.var, x)
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float = 1e-5
) -> Tensor:
    """Wu and He 2018: over a sample's positions and a group of consecutive channels."""
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, var = moments(grouped, (2,))
    return scaled(((grouped - mean) / (var + eps) ** 0.5).reshape(x.shape), weight, bias)


def instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ulyanov et al. 2016: over a sample's positions, per channel."""
    mean, var = moments(x, position_dims(x))
    if running is not None:
        positions = x[0, 0].numel()
        unbiased = var * positions / (positions - 1)
        running.update(mean.mean(0).flatten(), unbiased.mean(0).flatten(), momentum)
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, unbiased: bool = True, eps: float = 1e-5
) -> Tensor:
    """Dai and Heckel 2019: over a sample's positions, per channel, with the unbiased variance."""
    mean, var = moments(x, position_dims(x))
    positions = x[0, 0].numel()
    var = var * positions / (positions - 1) if unbiased else var
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def layer_norm_of_maps(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Ba et al. 2016 on a feature map: over all channels and positions of a sample."""
    mean, var = moments(x, tuple(range(1, x.ndim)))
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def layer_norm_of_positions(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Liu et al. 2022: over the channels at each position."""
    mean, var = moments(x, (1,))
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def rms_norm_of_maps(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Zhang and Sennrich 2019 on a feature map: over all channels and positions of a sample."""
    square, _ = moments(x**2, tuple(range(1, x.ndim)))
    return scaled(x / (square + eps) ** 0.5, weight, bias)


def rms_norm_of_positions(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Zhang and Sennrich 2019: over the channels at each position."""
    square, _ = moments(x**2, (1,))
    return scaled(x / (square + eps) ** 0.5, weight, bias)


def softmax(logits: Tensor) -> Tensor:
    """Shares that are never zero."""
    return logits.exp() / logits.exp().sum()


def switchable_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    mean_weight: Tensor,
    var_weight: Tensor,
    *,
    training: bool = True,
    unbiased: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    shares_of: Callable[[Tensor], Tensor] = softmax,
) -> Tensor:
    """Luo et al. 2019 with the variances of their code, or with the biased ones of the paper.

    Second moments are averaged, and the squared mean taken off. What is kept is the variance that
    divided, or the unbiased one of a biased one. Others make shares of the logits in another way.
    """
    if x.ndim == 2:
        every = x.unsqueeze(2)
        y = switchable_norm(
            every,
            weight,
            bias,
            running,
            mean_weight,
            var_weight,
            training=training,
            unbiased=unbiased,
            momentum=momentum,
            eps=eps,
            shares_of=shares_of,
        )
        return y.squeeze(2)
    samples, positions = x.shape[0], x[0, 0].numel()
    own_mean, own_var = moments(x, position_dims(x))
    if unbiased and positions > 1:
        own_var = own_var * positions / (positions - 1)
    square = own_var + own_mean**2
    statistics = [(own_mean, own_var)]
    for dim in (1, 0):
        mean = own_mean.sum(dim, keepdim=True) / x.shape[dim]
        statistics.append((mean, square.sum(dim, keepdim=True) / x.shape[dim] - mean**2))
    if training:
        mean, var = statistics[2]
        values = samples * positions
        bessel = 1 if unbiased and positions > 1 else values / (values - 1)
        running.update(mean.flatten(), var.flatten() * bessel, momentum)
    else:
        statistics[2] = per_channel(running.mean, x), per_channel(running.var, x)
    shares = [shares_of(logits) for logits in (mean_weight, var_weight)]
    mean = sum(share * one for share, (one, _) in zip(shares[0], statistics, strict=True))
    var = sum(share * one for share, (_, one) in zip(shares[1], statistics, strict=True))
    return scaled((x - mean) / (var + eps) ** 0.5, weight, bias)


def mean_and_unbiased_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch norm keeps of all its data (N, C, ...), per channel."""
    mean, var = moments(x, (0, *position_dims(x)))
    values = x.numel() // x.shape[1]
    return mean.flatten(), var.flatten() * values / (values - 1)


def position_dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over some dimensions, which stay as ones."""
    values = 1
    for dim in dims:
        values *= x.shape[dim]
    mean = x.sum(dims, keepdim=True) / values
    return mean, ((x - mean) ** 2).sum(dims, keepdim=True) / values


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * per_channel(weight, x) + per_channel(bias, x)
