"""What both memory formats use of torch's batch norm on the processor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch_norm_sums"]


def batch_norm_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy per channel, which is batch norm's backward for a unit gain."""
    one, centre = mean.new_ones(mean.numel()), mean.reshape(-1)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, centre, one, centre, one, True, 0.0, [False, True, True]
    )
    return products.view(mean.shape), sums.view(mean.shape)
