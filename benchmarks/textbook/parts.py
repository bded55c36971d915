"""What textbook norms are put together from: statistics, standardization, gain and offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: ``formula(x, norm) -> y``: what a norm makes in training of maps (N, C, H, W), by the settings,
#: parameters and buffers of the module, which are read by name; those that it keeps it updates.
Formula = Callable[[Tensor, Any], Tensor]

BATCH, SAMPLE, CHANNEL, POSITION = (0, 2, 3), (1, 2, 3), (2, 3), (1,)


def moments(x: Tensor, dims: Sequence[int], correction: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance over some dimensions, which stay as ones."""
    return x.mean(dims, keepdim=True), x.var(dims, keepdim=True, correction=correction)


def standardized(x: Tensor, mean: Tensor, var: Tensor, norm: Any) -> Tensor:
    return (x - mean) / (var + norm.eps).sqrt()


def beside(values: Tensor) -> Tensor:
    """(C,) beside maps, or (N, C)."""
    return values[..., None, None] if values.ndim == 2 else values[None, :, None, None]


def affine(z: Tensor, norm: Any) -> Tensor:
    """weight · z + bias, of those that there are."""
    if norm.weight is not None:
        z = z * beside(norm.weight)
    return z if norm.bias is None else z + beside(norm.bias)


@torch.no_grad()
def follow(norm: Any, **measured: Tensor) -> None:
    """Count the batch, and move what is kept towards what was measured."""
    norm.num_batches_tracked += 1
    for name, new in measured.items():
        kept = getattr(norm, name)
        kept.lerp_(new.reshape(kept.shape), norm.momentum)


def over_batch(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch; the running statistics follow, as torch's do."""
    mean, var = moments(x, BATCH)
    values = x.numel() / x.shape[1]
    follow(norm, running_mean=mean, running_var=var * values / (values - 1))
    return mean, var


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) as (N, groups, C / groups, H, W)."""
    return x.unflatten(1, (groups, -1))


def by_group(x: Tensor, groups: int, norm: Any) -> Tensor:
    """Every group of a sample's channels, standardized."""
    grouped = in_groups(x, groups)
    return standardized(grouped, *moments(grouped, (2, 3, 4)), norm).flatten(1, 2)


class Textbook(nn.Module):
    """A norm computed by a formula, with the parameters and buffers of normswap's layer."""

    def __init__(self, formula: Formula, norm: nn.Module) -> None:
        super().__init__()
        self.formula = formula
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.norm)
