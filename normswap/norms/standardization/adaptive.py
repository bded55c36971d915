"""Adaptive batch normalization: a learned blend of the input and its batch normalization.

Chen, Xu and Koltun, "Fast Image Processing with Fully-Convolutional Networks", ICCV 2017,
arXiv 1709.00643.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.declared import declared
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Rule

__all__ = ["ENTRIES", "AdaptiveBatchNorm"]


class AdaptiveBatchNorm(MeasuredNorm):
    """input_weight · x + norm_weight · BN(x), two numbers a layer.

    Here they start at 0 and 1, where it is batch normalization; the paper starts at 1 and 0,
    where it is the identity.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.
    """

    own = ("input_weight", "norm_weight")

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.input_weight = nn.Parameter(torch.zeros(()))
        self.norm_weight = nn.Parameter(torch.ones(()))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Add the input to what batch normalization makes of it."""
        gain, offset = self.standardized(*self.over_batch(mean, var, positions))
        share = self.norm_weight.to(mean.dtype)
        return gain * share + self.input_weight.to(mean.dtype), offset * share

    def pools(self, *, tracks: bool) -> Rule:
        """The batch."""
        return Rule(BATCH, RUNNING if tracks else BATCH)

    def obstacle(self) -> str:
        """No other norm passes its input on."""
        if self.input_weight.is_meta or (self.input_weight == 0 and self.norm_weight == 1):
            return ""
        return "it has learned to pass its input on, which no other norm does"


ENTRIES = (
    declared(
        AdaptiveBatchNorm,
        name="adaptive_bn",
        aliases=("adaptive_batch_norm",),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W, per channel",
        paper="Chen et al. 2017, arXiv 1709.00643",
    ),
)
