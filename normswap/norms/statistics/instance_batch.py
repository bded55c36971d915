"""IBN-Net's normalization: some channels by instance, the others by batch normalization.

Pan, Luo, Shi and Tang, "Two at Once: Enhancing Learning and Generalization Capacities via
IBN-Net", ECCV 2018, arXiv 1807.09441.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Pool, Rule, per_group

__all__ = ["ENTRIES", "InstanceBatchNorm"]

RATIO = 0.5


class InstanceBatchNorm(MeasuredNorm):
    """IBN-a: the first int(ratio · C) channels by instance, the others by batch normalization.

    The paper puts it in place of the first norm of each block in the first three stages of a
    ResNet: ``where=["layer1.*.bn1", "layer2.*.bn1", "layer3.*.bn1"]``. Running statistics are
    kept of all channels, and used of the others.

    Args:
        num_features: C.
        ratio: the share of the channels that are normalized by instance, 0 to 1. Default 0.5.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward on maps of one position.
    """

    def __init__(self, num_features: int, *, ratio: float = RATIO, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.ratio = ratio

    @property
    def by_instance(self) -> int:
        """How many channels are normalized by instance."""
        return int(self.num_features * self.ratio)

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Take each channel's statistics of its sample or of the batch."""
        centre, spread = self.over_batch(mean, var, positions)
        if self.by_instance:
            self.refuse_single_value(positions, "use a larger map")
        first = torch.arange(self.num_features, device=mean.device) < self.by_instance
        return self.standardized(torch.where(first, mean, centre), torch.where(first, var, spread))

    def pools(self, *, tracks: bool) -> Rule:
        """Both, by their share of the channels."""
        share = self.by_instance / self.num_features
        own = (per_group(1), share, share)

        def with_own(batch: Pool) -> Pool:
            rest = (batch, 1 - share, 1 - share)
            return Pool("mixture", shares=(own, rest)) if share else batch

        return Rule(with_own(BATCH), with_own(RUNNING if tracks else BATCH))


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


ENTRIES = (
    declared(
        InstanceBatchNorm,
        name="ibn",
        aliases=("ibn_a", "instance_batch_norm"),
        kind="batch_norm",
        axis="statistics",
        pooled="H·W per sample for some channels, N × H·W for the others",
        paper="Pan et al. 2018, arXiv 1807.09441",
        options=(Option("ratio", RATIO, "channels by instance", "from 0 to 1", _is_share),),
    ),
)
