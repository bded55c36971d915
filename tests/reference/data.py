"""Numbers for tests: random, the same at every run, and independent of the global generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: How near double precision results are to be.
EXACT = {"rtol": 0.0, "atol": 1e-10}


def values(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers around 0.5 with deviation 1.5, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module double precision and parameters that are all different; return it."""
    module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(values(*parameter.shape, seed=1000 + seed + index))
    return module


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors agree to 1e-10."""
    torch.testing.assert_close(actual, expected, **EXACT)
