"""Batch renormalization: training by the batch, corrected towards what evaluation will go by.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
NIPS 2017, arXiv 1702.03275.

In training a channel is standardized by its batch, and then scaled by r and shifted by d, which
make of that what the running statistics would; no gradient goes into either, and limits hold them
near 1 and 0. The paper widens the limits with the steps of training. Norms that take the place of
others count their steps from zero, and so start as batch normalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import number
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.precision import precise
from normswap.norms.state import NormState
from normswap.norms.tracked import OwnTerms

__all__ = ["ENTRIES", "BatchRenorm"]

#: For how many steps there is no correction, and at how many the widest limits are reached.
PLAIN_STEPS, R_STEPS, D_STEPS = 5_000, 40_000, 25_000
WIDEST_R, WIDEST_D = 3.0, 5.0


@dataclass(frozen=True)
class _Corrected(Pool):
    """The batch, corrected towards the running statistics within limits."""

    over: Over = "batch"
    r_max: float | None = None
    d_max: float | None = None


class BatchRenorm(OwnTerms, MeasuredNorm):
    """weight · (r · (x - μ) / s + d) + bias, where s² = σ² + eps; μ and σ² are those of the batch.

    r is s / running_std, from 1 / r_max to r_max, and d is (μ - running_mean) / running_std, from
    -d_max to d_max, both by what was kept before the batch. In eval mode it is
    weight · (x - running_mean) / running_std + bias.

    Args:
        num_features: C.
        r_max: at least 1; ``None`` for the paper's schedule: 1 for 5000 steps, then growing evenly
            to 3 at 40 000.
        d_max: not negative; ``None`` for the paper's: 0 for 5000 steps, then growing evenly to 5
            at 25 000.
        **rest: as for `MeasuredNorm`. The paper has eps 1e-3 and momentum 0.01.

    Attributes:
        running_mean: (C,).
        running_std: (C,), the root of variance and eps; starts at 1. No number of values corrects
            it in training; what a statistics pass finds is a root of variances.
        num_batches_tracked: a long scalar, the steps of training.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_std",)
    absorbs_eps = True
    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | None = None,
        d_max: float | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.r_max = r_max
        self.d_max = d_max
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the batch and correct, or in eval mode by what was kept."""
        if self.running_var is not None:
            return self.standardized(*self.over_batch(mean, var, positions))
        kept_mean, kept_std = self.running_mean.to(mean.dtype), self.running_std.to(mean.dtype)
        if not self.training:
            return self.with_affine(1 / kept_std, -kept_mean / kept_std)
        centre, spread, values = self.of_batch(mean, var, positions)
        std = (spread + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = self._limits(mean)
            r = torch.maximum(torch.minimum(std / kept_std, r_max), 1 / r_max)
            d = torch.maximum(torch.minimum((centre - kept_mean) / kept_std, d_max), -d_max)
        gain = r / std
        if values:
            self.track(running_mean=centre, running_std=std)
        return self.with_affine(gain, d - gain * centre)

    def _limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """How far r and d may go at this step, two scalars."""
        beyond = (self.num_batches_tracked - PLAIN_STEPS).to(like.dtype)
        r_share = (beyond / (R_STEPS - PLAIN_STEPS)).clamp(0, 1)
        d_share = (beyond / (D_STEPS - PLAIN_STEPS)).clamp(0, 1)
        return (
            1 + (WIDEST_R - 1) * r_share if self.r_max is None else like.new_tensor(self.r_max),
            WIDEST_D * d_share if self.d_max is None else like.new_tensor(self.d_max),
        )

    def pools(self, *, tracks: bool) -> Rule:
        """The batch, with what corrects it."""
        return Rule(_Corrected(r_max=self.r_max, d_max=self.d_max), RUNNING)

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The deviation that divides as the variance did."""
        return {"running_mean": mean, "running_std": (var + eps).sqrt()}

    def kept(self, state: NormState) -> dict[str, Tensor]:
        """The same; and steps count from zero, but where the average is over all batches."""
        kept = super().kept(state)
        if self.momentum is not None:
            kept.pop("num_batches_tracked", None)
        return kept

    def retold(self) -> dict[str, Tensor]:
        """Without eps the deviation's square is the variance."""
        var = precise(self.running_std).square() - self.eps
        return {"running_var": var.to(self.running_std.dtype)}


ENTRIES = (
    declared(
        BatchRenorm,
        name="batch_renorm",
        aliases=("batch_renormalization",),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W, per channel, corrected towards the running statistics",
        paper="Ioffe 2017, arXiv 1702.03275",
        options=(
            number("r_max", "the most scaling; None: 1 to 3 by the steps", low=1.0, high=1e6),
            number("d_max", "the most shift; None: 0 to 5 by the steps", low=0.0, high=1e6),
        ),
    ),
)
