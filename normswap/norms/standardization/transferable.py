"""Transferable normalization: two domains in a batch, and more weight where they agree.

Wang, Jin, Long, Wang and Jordan, "Transferable Normalization: Towards Improving Transferability of
Deep Neural Networks", NeurIPS 2019.

The first half of a batch in training is of the source domain, the second of the target, one more
if the samples are odd; with several ranks this holds for each. Each half is standardized by its own
statistics. Channels whose two standardized means are near each other count more, at 1 on average,
and are added to what would come out without: an output is twice that of batch normalization where
all channels agree. So a weight and a bias that replace a BatchNorm's are half as large. Evaluation
takes every sample for one of the target domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.errors import DegeneratePooling
from normswap.norms.counts import Counts, factor
from normswap.norms.declared import declared
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.precision import precise
from normswap.norms.tracked import OwnTerms

__all__ = ["ENTRIES", "TransNorm"]


@dataclass(frozen=True)
class _Halves(Pool):
    """Each half of the batch.

    Args:
        apart: whether the domains' running statistics differ, and with them what a gain that is
            the same in eval mode is in training.
    """

    over: Over = "batch"
    apart: bool = False


class TransNorm(OwnTerms, MeasuredNorm):
    """(1 + a) · (weight · (x - μ) / sqrt(σ² + eps) + bias), with μ and σ² of a half of the batch.

    a is C · p / Σ p, where p = 1 / (1 + |mₛ - mₜ|) and m is a domain's mean divided by the root of
    its unbiased variance and eps. No gradient goes through a.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.

    Attributes:
        running_mean_source: (C,), as is running_mean_target; they start at 0.
        running_var_source: (C,), as is running_var_target; they start at 1.
        num_batches_tracked: a long scalar.

    Raises:
        DegeneratePooling: at a forward in training where a half has no samples, or a single value
            for each channel.
    """

    own = (
        "running_mean_source",
        "running_var_source",
        "running_mean_target",
        "running_var_target",
    )
    counts = Counts(2.0, 2.0)
    measurable = False
    running_mean_source: Tensor
    running_var_source: Tensor
    running_mean_target: Tensor
    running_var_target: Tensor

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        for domain in ("source", "target"):
            self.register_buffer(f"running_mean_{domain}", torch.zeros(num_features))
            self.register_buffer(f"running_var_{domain}", torch.ones(num_features))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize each half by itself, and weigh the channels."""
        source, target = (
            (kept_mean.to(mean.dtype), kept_var.to(mean.dtype))
            for kept_mean, kept_var in self._kept()
        )
        if not self.training:
            return self._weighed(*self.standardized(*target), source, target)
        if len(mean) == 1 and not self.pools_ranks:
            raise DegeneratePooling(
                f"{self.called}: a batch of one sample has no source half; give both domains, "
                "source first, or leave this layer out by skip="
            )
        sizes = [len(mean) // 2, len(mean) - len(mean) // 2]
        halves = zip(torch.split(mean, sizes), torch.split(var, sizes), strict=True)
        centres, spreads, measured = [], [], []
        for half in halves:
            centre, spread, values = self.of_batch(*half, positions)
            centres.append(centre)
            spreads.append(spread)
            measured.append((centre.detach(), spread.detach() * (values / max(values - 1, 1))))
        if values:
            self.track(**self._named(*measured))
        made = self.standardized(torch.stack(centres), torch.stack(spreads))
        gain, offset = (
            torch.cat([row.expand(size, -1) for row, size in zip(each, sizes, strict=True)])
            for each in self._weighed(*made, *measured)
        )
        return gain, offset

    def _weighed(
        self,
        gain: Tensor,
        offset: Tensor,
        source: tuple[Tensor, Tensor],
        target: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Count channels more where both domains' means and unbiased variances agree."""
        more = 1 + self._agreement(source, target)
        offset = offset.expand_as(gain) * more
        return gain * more, offset

    def _agreement(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        """How much more each channel counts, (C,)."""
        one, other = (mean * (var + self.eps).rsqrt() for mean, var in (source, target))
        near = 1 / (1 + (one - other).abs())
        return near / near.mean()

    def _kept(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and variance of both domains."""
        return (
            (self.running_mean_source, self.running_var_source),
            (self.running_mean_target, self.running_var_target),
        )

    @staticmethod
    def _named(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Such pairs by the names of the buffers."""
        return {
            "running_mean_source": source[0],
            "running_var_source": source[1],
            "running_mean_target": target[0],
            "running_var_target": target[1],
        }

    def pools(self, *, tracks: bool) -> Rule:
        """Halves of the batch."""
        known, pairs = not self.running_mean_source.is_meta, zip(*self._kept(), strict=True)
        apart = known and not all(torch.equal(one, other) for one, other in pairs)
        return Rule(_Halves(apart=apart), RUNNING)

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The same for both domains."""
        return self._named((mean, var), (mean, var))

    def retold(self) -> dict[str, Any]:
        """The target's statistics, and by how much each channel counts in eval mode."""
        told = {"running_mean": self.running_mean_target, "running_var": self.running_var_target}
        if self.running_mean_source.is_meta:
            return told
        pairs = ((precise(mean), precise(var)) for mean, var in self._kept())
        more = factor(1 + self._agreement(*pairs))
        return {**told, "counts": Counts(more, more)}


ENTRIES = (
    declared(
        TransNorm,
        name="transnorm",
        aliases=("transferable_norm", "trans_norm"),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W of each half of the batch, per channel",
        paper="Wang et al. 2019, NeurIPS 2019",
    ),
)
