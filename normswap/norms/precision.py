"""In which precision starts and readers compute."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["precise"]


def precise(tensor: Tensor) -> Tensor:
    """A tensor's values in float64, where the device has it."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
