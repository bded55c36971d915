"""Extended batch normalization: one deviation for all channels.

Luo, Zhan, Wang and Gao, "Extended Batch Normalization", 2020, arXiv 2003.05569.
"""

from __future__ import annotations

from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import Pool, Rule

__all__ = ["ENTRIES", "ExtendedBatchNorm"]


class ExtendedBatchNorm(MeasuredNorm):
    """weight · (x - μ) / sqrt(v + eps) + bias: μ of a channel's batch, v the mean variance of all.

    The deviation is taken from each channel's own mean, so that offsets of the channels do not
    shrink everything. The running variance is kept for each channel, as BatchNorm's is; what
    divides is its mean. So nothing is lost on the way back.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.
    """

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Centre each channel, divide all by one deviation."""
        centre, spread = self.over_batch(mean, var, positions)
        return self.standardized(centre, spread.mean())

    def pools(self, *, tracks: bool) -> Rule:
        """The batch, with one variance."""
        batch, running = Pool("batch", common=True), Pool("running", common=True)
        return Rule(batch, running if tracks else batch)


ENTRIES = (
    declared(
        ExtendedBatchNorm,
        name="ebn",
        aliases=("extended_batch_norm", "extended_bn"),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W per channel for the mean, and N × C × H·W for the variance",
        paper="Luo et al. 2020, arXiv 2003.05569",
    ),
)
