"""What norms share that are written out in plain torch: weight and bias after all the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.base import Norm
from normswap.norms.reading import layout, tensors

__all__ = ["AffineNorm", "described", "per_channel"]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), beside an input (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class AffineNorm(Norm, ABC):
    """weight · z + bias, where z is what `standardize` makes of the input.

    It is computed in single precision at least, and handed on in the input's. Everything is plain
    torch, and autograd goes through it.

    Args:
        num_features: C.
        eps: what keeps from dividing by zero, or is kept for a norm that does. Default 1e-5.
        dim: how many dimensions follow the channels, kept for a conversion to a norm that has to
            know. Any input (N, C, ...) is taken.

    Attributes:
        weight: (C,) or ``None``, as is bias. A module is made without them; `normswap.build` and
            `normswap.convert` put them in.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, dim: int | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.dim = dim
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @abstractmethod
    def standardize(self, x: Tensor) -> Tensor:
        """What gain and offset are applied to, of the shape of the input.

        Args:
            x: (N, C, ...), in float32 or float64.
        """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        z = self.standardize(x.to(torch.promote_types(x.dtype, torch.float32)))
        return self.with_affine(z).to(x.dtype)

    def with_affine(self, z: Tensor) -> Tensor:
        """weight · z + bias: a tensor that may be overwritten, while backward still asks for z."""
        if self.weight is None and self.bias is None:
            return z.clone()
        if self.weight is not None:
            z = z * per_channel(self.weight, z)
        return z if self.bias is None else z + per_channel(self.bias, z)

    def extra_repr(self) -> str:
        """Say size and eps."""
        return f"{self.num_features}, eps={self.eps}"


def described(module: AffineNorm) -> dict[str, Any]:
    """What a reader says of any of them: `NormState`'s fields but name, kind, rule, settings."""
    return {
        "num_features": module.num_features,
        "eps": module.eps,
        "dim": module.dim,
        **tensors(module),
        **layout(module),
    }
