"""Norms that are arithmetic on the mean and variance of every sample's channel.

Such a norm is written as its rule: how (N, C) means and variances make gain and offset. What is
done to the input, forward and backward, is done in `normswap.norms.moments`; synchronisation over
ranks, running statistics and their bookkeeping in `MeasuredNorm.over_batch`. Batch normalization
would be

    class Batch(MeasuredNorm):
        def rule(self, mean, var, positions):
            return self.standardized(*self.over_batch(mean, var, positions))

layer normalization over a sample's map

            return self.standardized(*pooled(mean, var, 1))

and a half of each

            one, other = pooled(mean, var, 1), self.over_batch(mean, var, positions)
            return self.standardized((one[0] + other[0]) / 2, (one[1] + other[1]) / 2)

where ``standardized(centre, spread)`` is weight / sqrt(spread + eps) and bias - gain · centre.
Everything is plain torch, of any shape that expands to (N, C), and autograd goes through it.
`normswap.norms.declared` makes a norm of the registry of such a class.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from normswap.norms.moments import normalized
from normswap.norms.plain import PlainNorm
from normswap.norms.pooled import pooled
from normswap.norms.state import RUNNING_STATISTICS
from normswap.norms.sync import merged

__all__ = ["MeasuredNorm", "pooled"]


class MeasuredNorm(PlainNorm):
    """A norm by a rule on the mean and variance of every sample's channel.

    Args:
        num_features: C.
        *args: as for `PlainNorm`; eps is added to the variance.
        **rest: likewise.

    Attributes:
        measurable: whether a mean and a variance tell all that it keeps, so that a statistics pass
            can find that. It lends a norm that keeps other terms a running mean and variance
            while it measures, by which the norm is batch normalization.
        plain_statistics: set while a statistics pass measures: whatever the rule divides by, what
            is kept is the unbiased variance of the batch.
        observed: set likewise: in train mode, but nothing else than running statistics may move.
        running_mean: (C,) or ``None``, as are running_var and num_batches_tracked. Like weight
            and bias they are put in by `normswap.build` and `normswap.convert`.
    """

    tracks: ClassVar[bool] = True
    synchronizes: ClassVar[bool] = True
    measurable: ClassVar[bool] = True
    plain_statistics: bool = False
    observed: bool = False
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, num_features: int, *args: Any, **rest: Any) -> None:
        super().__init__(num_features, *args, **rest)
        for name in RUNNING_STATISTICS:
            self.register_buffer(name, None)

    @abstractmethod
    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Gain and offset, of shapes that expand to (N, C).

        Args:
            mean: of every sample's channel, (N, C), in float32 or float64.
            var: its biased variance, likewise.
            positions: how many values each was taken of.
        """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        return normalized(x, partial(self.rule, positions=math.prod(x.shape[2:])))

    def standardized(self, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset of ``weight · (x - centre) / sqrt(spread + eps) + bias``."""
        gain = (spread + self.eps).rsqrt()
        if self.weight is not None:
            gain = gain * self.weight
        shift = gain * centre
        return gain, -shift if self.bias is None else self.bias - shift

    def with_affine(self, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset of ``weight · (gain · x + offset) + bias``."""
        if self.weight is not None:
            gain, offset = gain * self.weight, offset * self.weight
        return gain, offset if self.bias is None else offset + self.bias

    def within(self, positions: int) -> float:
        """A factor for each sample's variances, where a paper takes unbiased ones. Default 1.

        With another factor the running variance follows what `over_batch` returns in training.
        With 1 it follows n/(n - 1) times the variance of n values, as torch's does.

        Args:
            positions: how many values each was taken of.
        """
        return 1.0

    def over_batch(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch in training, the running statistics in eval, (C,) each.

        Training updates the running statistics, where there are some. With ``sync`` the batch is
        that of all ranks, of which some may have few samples or none; gradients are those of one
        process on all samples.

        Args:
            mean: of every sample's channel, (N, C).
            var: its biased variance times `within`, likewise.
            positions: how many values each was taken of.

        Raises:
            DegeneratePooling: there is a single value for each channel.
        """
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        centre, spread, total = self.of_batch(mean, var, positions)
        if self.training and total:
            kept, within = spread, self.within(positions)
            if self.plain_statistics and within != 1.0:
                kept, within = pooled(mean, var / within, 0)[1], 1.0
            self._track(centre, kept, total / (total - 1) if within == 1.0 else 1.0)
        return centre, spread

    def of_batch(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor, int]:
        """Mean, biased variance and number of the batch's values, with ``sync`` of all ranks'.

        As in torch, an empty batch is let through, and has zero values.

        Args:
            mean: of every sample's channel, (N, C).
            var: its variance, likewise.
            positions: how many values each was taken of.

        Raises:
            DegeneratePooling: there is a single value for each channel.
        """
        values = mean.shape[0] * positions
        if self.pools_ranks:
            centre = mean.sum(0) / max(mean.shape[0], 1)
            m2 = (var + (mean - centre).square()).sum(0) * positions
            group, name = self.process_group, self.called
            centre, spread, total = merged(values, centre, m2, group=group, name=name)
            return centre.to(mean.dtype), spread.to(mean.dtype), total
        if values == 0:
            return mean.sum(0), var.sum(0), 0
        self.refuse_single_value(values, "use a larger batch")
        return *pooled(mean, var, 0), values

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, factor: float = 1.0) -> None:
        """Count the batch, and let the running statistics follow it, where there are some.

        Args:
            mean: of the batch, (C,).
            var: of the batch, (C,).
            factor: what the variance is multiplied by to be kept.
        """
        if self.running_mean is not None:
            self.track(running_mean=mean, running_var=var if factor == 1.0 else var * factor)
