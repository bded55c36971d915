"""Batch-channel normalization: batch normalization, and group normalization of what comes of it.

Qiao, Wang, Liu, Shen and Yuille, "Rethinking Normalization and Elimination Singularity in Neural
Networks", 2019, arXiv 1911.09738.

For batches of a few samples the paper standardizes by an estimate in training, too: running
statistics that have followed the batch already, through which no gradient goes. ``estimated=True``
does that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.counts import Counts, factor
from normswap.norms.declared import declared
from normswap.norms.entry import flag
from normswap.norms.grouped import GROUPS, GroupedNorm
from normswap.norms.measured import MeasuredNorm, pooled
from normswap.norms.pool import BATCH, RUNNING, Over, Pool, Rule, per_group
from normswap.norms.precision import precise
from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "BatchChannelNorm"]


@dataclass(frozen=True)
class _Twice(Pool):
    """A channel by the statistics of the first pool, then a group of channels of a sample.

    Where gain and offset of the second follow from those of the first, it is expected to leave
    what the first has made.

    Args:
        estimated: whether the first pool is what is kept once the batch is in.
        learned: whether gain and offset of the second are no longer those that follow.
    """

    over: Over = "mixture"
    estimated: bool = False
    learned: bool = False

    @property
    def by_channel(self) -> bool:
        """As the first is."""
        return True

    def share(self, other: Pool) -> float:
        """All or nothing."""
        return float(self == other)

    def expected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the first expects."""
        return mean, var


class BatchChannelNorm(GroupedNorm, MeasuredNorm):
    """group_weight · (z - m) / sqrt(s² + eps) + group_bias, where z = weight · BN(x) + bias.

    m and s² are mean and biased variance of a sample's group of channels of z.

    Args:
        num_features: C.
        num_groups: how many groups of consecutive channels; by default as of a `GroupNorm`.
        estimated: standardize in training by the running statistics, where there are some; they
            follow the batch first, the variance the square distance from the running mean, which
            no number of values corrects. Default no.
        **rest: as for `MeasuredNorm`.

    Attributes:
        group_weight: (num_groups,), as is group_bias; one for all channels of a group.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel, and at any
            where a group holds a single value.
    """

    own = ("group_weight", "group_bias")

    def __init__(
        self,
        num_features: int,
        *,
        estimated: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.estimated = estimated
        self.group_weight = nn.Parameter(torch.ones(self.num_groups))
        self.group_bias = nn.Parameter(torch.zeros(self.num_groups))

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the batch, and what comes of it by groups."""
        self.refuse_single_value(
            self.channels_per_group * positions, "use fewer groups or a larger map"
        )
        gain, offset = self.standardized(*self.over_batch(mean, var, positions))
        groups = self.num_groups, self.channels_per_group
        gain, offset, mean, var = (
            each.reshape(*each.shape[:-1], *groups) for each in (gain, offset, mean, var)
        )
        centre, spread = pooled(gain * mean + offset, gain.square() * var, 2)
        scale = self.group_weight.to(mean.dtype)[:, None] * (spread + self.eps).rsqrt()
        shift = self.group_bias.to(mean.dtype)[:, None] - scale * centre
        return (scale * gain).flatten(1), (scale * offset + shift).flatten(1)

    def over_batch(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """The batch's statistics, or if they are to be estimated what is kept once they are in."""
        estimates = self.estimated and self.training and not self.observed
        kept_mean, kept_var = self.running_mean, self.running_var
        if not estimates or kept_mean is None or kept_var is None:
            return super().over_batch(mean, var, positions)
        centre, spread, values = self.of_batch(mean.detach(), var.detach(), positions)
        if values:
            square = spread + (centre - kept_mean.to(mean.dtype)).square()
            self.track(running_mean=centre, running_var=square)
        return kept_mean.to(mean.dtype, copy=True), kept_var.to(mean.dtype, copy=True)

    def started(self, state: NormState, start: Start) -> Start:
        """Start with gain and offset of groups that are expected to leave z as it is."""
        return start if start.fresh else replace(start, kept=partial(self._neutral, state, start))

    def _neutral(self, state: NormState, start: Start) -> dict[str, Tensor]:
        """Such gain and offset, for the weight and bias that it starts with."""
        dtype = state.reference().dtype
        made = (each.to(dtype) for each in self._leaving(*start.affine_of(state)))
        return {**start.kept(), **dict(zip(self.own, made, strict=True))}

    def _leaving(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset of groups, (num_groups,) each, that are expected to leave z as it is."""
        weight, bias = (each.view(self.num_groups, -1) for each in (weight, bias))
        square = weight.square().mean(1) + bias.var(1, correction=0)
        return (square + self.eps).sqrt(), bias.mean(1)

    def retold(self) -> dict[str, Any]:
        """What the second gain and offset are expected to make of the first."""
        if not self._has_learned():
            return {}
        leaving = self._leaving(*self._first())
        scale = precise(self.group_weight) / leaving[0]
        shift = precise(self.group_bias) - scale * leaving[1]
        scale, shift = (each.repeat_interleave(self.channels_per_group) for each in (scale, shift))
        return {"counts": Counts(factor(scale), factor(scale), factor(shift))}

    def _first(self) -> tuple[Tensor, Tensor]:
        """The first gain and offset, (C,) each, precisely."""
        one = precise(self.group_weight.new_ones(self.num_features))
        weight = one if self.weight is None else precise(self.weight)
        return weight, torch.zeros_like(one) if self.bias is None else precise(self.bias)

    def _has_learned(self) -> bool:
        """Whether the second gain and offset are others than they start with."""
        if self.group_weight.is_meta:
            return False
        pairs = zip(
            (self.group_weight, self.group_bias), self._leaving(*self._first()), strict=True
        )
        return not all(torch.equal(own, leaving.to(own.dtype)) for own, leaving in pairs)

    def pools(self, *, tracks: bool) -> Rule:
        """The batch, and then groups."""
        group, learned = per_group(self.channels_per_group), self._has_learned()

        def twice(batch: Pool) -> Pool:
            shares = ((batch, 0.5, 0.5), (group, 0.5, 0.5))
            estimated = self.estimated and batch is BATCH
            return _Twice(shares=shares, estimated=estimated, learned=learned)

        return Rule(twice(BATCH), twice(RUNNING if tracks else BATCH))


ENTRIES = (
    declared(
        BatchChannelNorm,
        name="bcn",
        aliases=("batch_channel_norm",),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W per channel, then a group of channels × H·W, per sample",
        paper="Qiao et al. 2019, arXiv 1911.09738",
        options=(
            *GROUPS,
            flag("estimated", False, "by running statistics in training too, for small batches"),
        ),
    ),
)
