"""Norms that are written on the values themselves: weight and bias after all the rest."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from normswap.norms.plain import PlainNorm
from normswap.norms.sync import merged

__all__ = ["AffineNorm", "per_channel"]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), beside an input (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


class AffineNorm(PlainNorm):
    """weight · z + bias, where z is what `standardize` makes of the input.

    It is computed in single precision at least, and handed on in the input's. Everything is plain
    torch, and autograd goes through it.
    """

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

    def over_ranks(self, mean: Tensor, count: int) -> Tensor:
        """The mean over all ranks' values of which ``mean`` is this one's, if they are pooled.

        Gradients are those of one process on all values, of which a rank may have none.

        Args:
            mean: of this rank's values, of any shape.
            count: how many values each was taken of.

        Raises:
            DegeneratePooling: there is a single value.
        """
        if self.pools_ranks:
            return self.over_all(mean, count)
        self.refuse_single_value(count, "use a larger batch")
        return mean

    def over_all(self, mean: Tensor, count: int) -> Tensor:
        """The mean over all ranks' values, as `over_ranks` gives it where they are pooled."""
        flat = mean.reshape(-1)
        none = torch.zeros_like(flat)
        whole, _, _ = merged(count, flat, none, group=self.process_group, name=self.called)
        return whole.to(mean.dtype).view(mean.shape)
