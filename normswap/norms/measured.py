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
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.norms.base import Norm
from normswap.norms.moments import normalized
from normswap.norms.pool import Rule
from normswap.norms.state import RUNNING_STATISTICS
from normswap.norms.sync import merged, ranks

__all__ = ["MeasuredNorm", "pooled"]


def pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all values along a dimension of (N, C), which stays as one.

    Over channels with ``dim=1``, over samples with 0; groups of channels are made before, by
    ``unflatten(1, (groups, -1))`` and ``dim=2``. It is the mean of the variances and the variance
    of the means, where every sample's channel has as many positions.
    """
    centre = mean.mean(dim, keepdim=True)
    return centre, var.mean(dim, keepdim=True) + (mean - centre).square().mean(dim, keepdim=True)


class MeasuredNorm(Norm, ABC):
    """A norm by a rule on the mean and variance of every sample's channel.

    Args:
        num_features: C.
        eps: added to the variance. Default 1e-5.
        momentum: weight of the newest batch in the running statistics; ``None`` for the plain
            average of all. Default 0.1.
        sync: whether training statistics of the batch are pooled over ranks.
        process_group: the ranks that share statistics; ``None`` for all.
        dim: how many dimensions follow the channels, kept for a conversion to a norm that has to
            know. Any input (N, C, ...) is taken.

    Attributes:
        plain_statistics: set while a statistics pass measures: whatever the rule divides by, what
            is kept is the unbiased variance of the batch.
        weight: (C,) or ``None``, as are bias and the running statistics. A module is made with
            none of them; `normswap.build` and `normswap.convert` put them in.
        tracks: whether such norms keep running statistics.
        synchronizes: whether they have ``sync``.
        counts: what weight and bias are multiplied by until something is learned beside them.
    """

    tracks: ClassVar[bool] = True
    synchronizes: ClassVar[bool] = True
    counts: ClassVar[tuple[float, float]] = (1.0, 1.0)
    plain_statistics: bool = False
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        sync: bool = False,
        process_group: Any = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.process_group = process_group
        self.dim = dim
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
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

    @abstractmethod
    def pools(self, *, tracks: bool) -> Rule:
        """What it pools over, given what it has learned.

        Args:
            tracks: whether it has running statistics.
        """

    def obstacle(self) -> str:
        """Why what it has learned beside weight and bias has no counterpart in another norm."""
        return ""

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        return normalized(x, partial(self.rule, positions=math.prod(x.shape[2:])))

    def standardized(self, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and offset of ``weight · (x - centre) / sqrt(spread + eps) + bias``."""
        gain = (spread + self.eps).rsqrt()
        return self.with_affine(gain, -gain * centre)

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
            var: its biased variance, likewise; `within` is what it is multiplied by.
            positions: how many values each was taken of.

        Raises:
            DegeneratePooling: there is a single value for each channel.
        """
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        values, within = mean.shape[0] * positions, self.within(positions)
        of_channels = var * within
        total: int | Tensor = values
        if self.sync and self.training and ranks(self.process_group) > 1:
            name = self.site_path or type(self).__name__
            divisor = max(mean.shape[0], 1)
            centre = mean.sum(0) / divisor
            m2 = (of_channels + (mean - centre).square()).sum(0) * positions
            centre, spread, total = merged(values, centre, m2, group=self.process_group, name=name)
            centre, spread = centre.to(mean.dtype), spread.to(mean.dtype)
        elif values == 0:
            # As in torch, an empty batch is let through and leaves the statistics.
            return mean.sum(0), var.sum(0)
        else:
            self.refuse_single_value(values, "use a larger batch")
            centre, spread = (each.squeeze(0) for each in pooled(mean, of_channels, 0))
        if self.training:
            kept = pooled(mean, var, 0)[1].squeeze(0) if self.plain_statistics else spread
            as_torch = within == 1.0 or self.plain_statistics
            self._track(centre, kept * (total / (total - 1)) if as_torch else kept)
        return centre, spread

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Count the batch, and let the running statistics follow it."""
        if self.running_mean is None or self.running_var is None:
            return
        weight: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                weight = self.num_batches_tracked.to(mean.dtype).reciprocal()
        for kept, new in ((self.running_mean, mean), (self.running_var, var)):
            kept.copy_(torch.lerp(kept.to(new.dtype), new, weight))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Papers' own code keeps these as (1, C, 1, 1) and counts no batches.
        for name in ("weight", "bias", "running_mean", "running_var"):
            theirs = state_dict.get(prefix + name)
            if theirs is not None and theirs.ndim > 1 and theirs.numel() == self.num_features:
                state_dict[prefix + name] = theirs.reshape(-1)
        if self.num_batches_tracked is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say size, eps and momentum, as torch's BatchNorm does."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
