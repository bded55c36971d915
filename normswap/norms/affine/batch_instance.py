"""Batch-instance normalization: for each channel a learned blend of the two.

Nam and Kim, "Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks",
NeurIPS 2018, arXiv 1805.07925.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.declared import declared
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Pool, Rule, per_group

__all__ = ["ENTRIES", "BatchInstanceNorm"]


class BatchInstanceNorm(MeasuredNorm):
    """weight · (gate · BN(x) + (1 - gate) · IN(x)) + bias, with a gate for each channel.

    The gate starts at 1, where it is batch normalization. It is kept between 0 and 1 by putting
    it back there, in place, at the start of every forward in training; a clamp in the formula
    would leave a gate beyond without gradient for good. The paper trains gates with ten times the
    learning rate and without weight decay.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.
    """

    own = ("gate",)

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.gate = nn.Parameter(torch.ones(num_features))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Blend the two standardized values, not their statistics."""
        if self.training and not self.observed:
            with torch.no_grad():
                self.gate.clamp_(0, 1)
        gate = self.gate.to(mean.dtype)
        centre, spread = self.over_batch(mean, var, positions)
        of_batch = gate * (spread + self.eps).rsqrt()
        of_sample = (1 - gate) * (var + self.eps).rsqrt()
        gain, offset = of_batch + of_sample, -(of_batch * centre + of_sample * mean)
        return self.with_affine(gain, offset)

    def pools(self, *, tracks: bool) -> Rule:
        """The batch; or both, by the mean of the gates."""
        batch = Rule(BATCH, RUNNING if tracks else BATCH)
        share = 1.0 if self.gate.is_meta else float(self.gate.detach().double().mean())
        if share == 1.0:
            return batch
        own = (per_group(1), 1 - share, 1 - share)
        return Rule(
            Pool("mixture", shares=(own, (batch.train, share, share))),
            Pool("mixture", shares=(own, (batch.eval, share, share))),
        )


ENTRIES = (
    declared(
        BatchInstanceNorm,
        name="bin",
        aliases=("batch_instance_norm",),
        kind="batch_norm",
        axis="affine",
        pooled="N × H·W per channel, and H·W per sample and channel",
        paper="Nam and Kim 2018, arXiv 1805.07925",
    ),
)
