"""Norms whose backward goes by estimates instead of the gradient of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .parts import BATCH, POSITION, Formula, affine, beside, follow


class Divided(torch.autograd.Function):
    """z = x / root with the gradient (dz - s · z) / root, where s = estimate(dz, z)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, root: Tensor, estimate: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        z = x / root
        ctx.save_for_backward(z, root)
        ctx.estimate = estimate
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, root = ctx.saved_tensors
        return (grads[0] - beside(ctx.estimate(grads[0], z)) * z) / root, None, None


def power_norm(x: Tensor, norm: Any) -> Tensor:
    """Shen et al. 2020, in its warm-up."""

    def estimate(dz: Tensor, z: Tensor) -> Tensor:
        share = 0.1 * norm.running_slope
        norm.running_slope += ((dz - beside(share) * z) * z).mean(BATCH)
        return share

    x = x / (x.square().mean(POSITION, keepdim=True) + norm.eps).sqrt()
    with torch.no_grad():
        square = x.square().mean(BATCH)
        norm.running_square.lerp_(square, 1 / (int(norm.num_batches_tracked) + 1))
        follow(norm, running_square=square)
    z: Tensor = Divided.apply(x, beside((square + norm.eps).sqrt()), estimate)
    return affine(z, norm)


def moving_average_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Yan et al. 2020, in its warm-up."""
    norm.steps += 1
    slot = int(norm.steps) % norm.buffer_size

    def estimate(dz: Tensor, z: Tensor) -> Tensor:
        norm.recent_products[slot] = (dz * z).mean(BATCH)
        return norm.recent_products[slot]

    with torch.no_grad():
        square = x.square().mean(BATCH)
        norm.recent_squares[slot] = square
        follow(norm, running_square=square)
    z: Tensor = Divided.apply(x, beside((square + norm.eps).sqrt()), estimate)
    return affine(z, norm)


FORMULAS: dict[str, Formula] = {"power_norm": power_norm, "mabn": moving_average_batch_norm}
