"""Instance enhancement batch normalization: every sample's channel scales its own output.

Liang, Huang, Liang and Yang, "Instance Enhancement Batch Normalization: An Adaptive Regulator of
Batch Noise", AAAI 2020, arXiv 1908.04008.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.counts import Counts
from normswap.norms.declared import declared
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Rule

__all__ = ["ENTRIES", "InstanceEnhancementBatchNorm"]


class InstanceEnhancementBatchNorm(MeasuredNorm):
    """weight · sigmoid(gate_weight · m + gate_bias) · BN(x) + bias; m: the sample channel's mean.

    At the start ``gate_weight`` is 0 and ``gate_bias`` -1: the gate is 1 / (1 + e) everywhere, and
    a weight that replaces a BatchNorm's is 1 + e times as large.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.
    """

    own = ("gate_weight", "gate_bias")
    counts = Counts(1 / (1 + math.e))

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.gate_weight = nn.Parameter(torch.zeros(num_features))
        self.gate_bias = nn.Parameter(torch.full((num_features,), -1.0))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Scale what batch normalization makes of a channel, not its offset."""
        centre, spread = self.over_batch(mean, var, positions)
        gate_weight, gate_bias = self.gate_weight.to(mean.dtype), self.gate_bias.to(mean.dtype)
        gain = (spread + self.eps).rsqrt() * (gate_weight * mean + gate_bias).sigmoid()
        return self.with_affine(gain, -gain * centre)

    def pools(self, *, tracks: bool) -> Rule:
        """The batch."""
        return Rule(BATCH, RUNNING if tracks else BATCH)

    def obstacle(self) -> str:
        """No other norm has such gates."""
        if self.gate_weight.is_meta or not (self.gate_weight.any() or (self.gate_bias + 1).any()):
            return ""
        return "its gates have learned to depend on the sample, as no other norm's do"


ENTRIES = (
    declared(
        InstanceEnhancementBatchNorm,
        name="iebn",
        aliases=("instance_enhancement",),
        kind="batch_norm",
        axis="affine",
        pooled="N × H·W per channel; the gain by H·W per sample and channel",
        paper="Liang et al. 2020, arXiv 1908.04008",
    ),
)
