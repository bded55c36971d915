"""Norms that pool over the batch and keep running statistics in terms of their own.

A mean and a variance do not say what such a norm needs in eval mode, or it keeps them in another
form. What it keeps is the module's own: `OwnTerms.terms` computes it from a source's running
statistics, `PlainNorm.retold` computes from it what they would be, and `PlainNorm.track` lets it
follow a batch. On the values themselves `AffineNorm.standardize` measures, and
`AffineNorm.over_ranks` makes a mean over the batch one over all ranks: a `TrackedNorm`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from normswap.norms.affine_norm import AffineNorm
from normswap.norms.plain import PlainNorm
from normswap.norms.precision import precise
from normswap.norms.state import NormState

__all__ = ["OwnTerms", "TrackedNorm"]


class OwnTerms(PlainNorm):
    """Mixed in before what a norm is written in: what it keeps is `terms` of its own.

    Attributes:
        num_batches_tracked: a long scalar.
    """

    tracks = True
    retells = True
    synchronizes = True
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *args: Any, **rest: Any) -> None:
        super().__init__(num_features, *args, **rest)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    @abstractmethod
    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """What it keeps, by name, to evaluate as a batch norm of these running statistics.

        Args:
            mean: (C,), in float64 where the device has it.
            var: (C,), likewise.
            eps: what that batch norm adds to the variance.
        """

    def kept(self, state: NormState) -> dict[str, Tensor]:
        """The source's running statistics in terms of its own, and how many batches they saw."""
        mean, var, count = state.running_mean, state.running_var, state.num_batches_tracked
        if mean is None or var is None:
            raise ValueError("the source keeps no running statistics")
        kept = {} if count is None else {"num_batches_tracked": count.detach().clone()}
        for name, value in self.terms(precise(mean), precise(var), state.eps).items():
            kept[name] = value.to(mean.dtype) if value.is_floating_point() else value
        return kept


class TrackedNorm(OwnTerms, AffineNorm):
    """weight · z + bias, where z is by the batch in training, by what was kept of many in eval.

    Args:
        num_features: C.
        **rest: as for `AffineNorm`.

    Attributes:
        num_batches_tracked: a long scalar.
    """
