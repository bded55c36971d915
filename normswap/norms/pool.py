"""What a normalization pools its statistics over, and what statistics to expect from that.

This is the whole difference between most norms, so it is what fidelity is judged by: two norms
with the same rule are the same function, two with the same evaluation rule agree in eval mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BATCH", "NOTHING", "POSITION", "RUNNING", "Curve", "Pool", "Rule", "per_group"]

#: See `Pool`.
Over = Literal["batch", "group", "position", "running", "mixture", "nothing", "curve", "whitening"]


@dataclass(frozen=True)
class Pool:
    """The set of values that share one mean and one variance, in an input (N, C, L).

    Args:
        over: ``"batch"``: over (N, L), per channel. ``"group"``: over L and ``channels``
            consecutive channels, per sample. ``"position"``: over C, per sample and position.
            ``"running"``: nothing is pooled, the running statistics are used. ``"mixture"``:
            the statistics are a mean of those of ``shares``. ``"nothing"``: the input is not
            standardized at all. ``"curve"``: a fixed function of each value, see `Curve`.
            ``"whitening"``: what was kept of covariances is used.
        channels: channels in a group; 1 is instance normalization, C is layer normalization.
        centred: whether the mean is subtracted; without it the statistic is the mean square.
        shares: of a mixture, the pools with their weights in its mean and in its variance.
        unbiased: whether the variance of n values is n/(n - 1) times their mean square.
        samples: of a batch that is taken in parts, how many samples a part has.
        common: of the batch or the running statistics, whether there is one variance, the mean of
            the channels'.
    """

    over: Over
    channels: int = 1
    centred: bool = True
    shares: tuple[tuple[Pool, float, float], ...] = ()
    unbiased: bool = False
    samples: int | None = None
    common: bool = False

    @property
    def measures(self) -> bool:
        """Whether statistics are taken from the input at hand."""
        return self.over in ("batch", "group", "position", "mixture")

    @property
    def meets(self) -> bool:
        """Whether samples of a batch change each other's outputs."""
        return self.over == "batch" or any(pool.meets for pool, _, _ in self.shares)

    @property
    def by_channel(self) -> bool:
        """Whether it expects of a channel what the running statistics tell of it."""
        if self.over == "mixture":
            return all(pool.by_channel for pool, _, _ in self.shares)
        alone = self.over in ("batch", "running") or (self.over == "group" and self.channels == 1)
        return alone and self.centred and not self.common

    def share(self, other: Pool) -> float:
        """How much of the statistics another pool gives, 0 to 1: the less of mean and variance."""
        if self == other:
            return 1.0
        return max(
            (min(mean, var) for pool, mean, var in self.shares if pool == other), default=0.0
        )

    def values(self, batch: int, num_features: int, length: int) -> int:
        """How many values one statistic is pooled over, for an input (N, C, L).

        Of a mixture, those over the batch count, if there are any; else the widest.
        """
        if self.over == "mixture":
            pools = [pool for pool, _, _ in self.shares if pool.measures]
            pools = [pool for pool in pools if pool.meets] or pools
            return max(pool.values(batch, num_features, length) for pool in pools)
        part = batch if self.samples is None else min(batch, self.samples)
        sizes = {"batch": part * length, "group": self.channels * length, "position": num_features}
        return sizes[self.over]

    def expected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Expected mean and variance, per channel, of what this pool will measure.

        Args:
            mean: running mean of each channel, (C,).
            var: running variance of each channel, (C,).

        Returns:
            Two tensors (C,): the pooled mean and the pooled (biased) variance that a sample
            drawn from channels of these statistics is expected to show; zero and the mean square
            where the pool is not centred.
        """
        if self.over == "mixture":
            means, variances = torch.zeros_like(mean), torch.zeros_like(var)
            for pool, of_mean, of_var in self.shares:
                pooled_mean, pooled_var = pool.expected(mean, var)
                means, variances = means + of_mean * pooled_mean, variances + of_var * pooled_var
            return means, variances
        if self.common:
            return mean, var.mean().expand_as(var)
        if not self.centred:
            square = var + mean.square()
            size = self.channels if self.over == "group" else len(square)
            pooled = square.view(-1, size).mean(1).repeat_interleave(size)
            return torch.zeros_like(mean), pooled
        if self.over == "group" and self.channels > 1:
            means, variances = mean.view(-1, self.channels), var.view(-1, self.channels)
            pooled_mean = means.mean(1)
            pooled_var = variances.mean(1) + means.var(1, correction=0)
            return (
                pooled_mean.repeat_interleave(self.channels),
                pooled_var.repeat_interleave(self.channels),
            )
        if self.over == "position":
            # The C values at one position vary around their own mean, which itself varies with
            # variance mean(var)/C when channels are uncorrelated: that part is not in the spread.
            spread = var.mean() * (1 - 1 / len(var)) + mean.var(correction=0)
            return mean.mean().expand_as(mean), spread.expand_as(var)
        return mean, var

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """What a norm of this pool divides by where it measures a variance."""
        return (var + eps).sqrt()


@dataclass(frozen=True)
class Curve(Pool):
    """No statistics but an elementwise function: ``curve(slope · x + shift)``.

    Args:
        curve: which function.
        slope: what the input is multiplied by.
        shift: what is added then.
        rise: the function's own derivative at zero.
    """

    over: Over = "curve"
    curve: str = "linear"
    slope: float = 1.0
    shift: float = 0.0
    rise: float = 1.0

    @property
    def linear(self) -> bool:
        """Whether gain and offset make any other gain and offset of it."""
        return self.curve == "linear"

    def expected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics whose standardization has the function's derivative at zero."""
        flat = 1 / (self.slope * self.rise)
        return torch.zeros_like(mean), torch.full_like(var, flat * flat)

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """What its derivative at zero divides by; there is no eps."""
        return var.sqrt()


BATCH = Pool("batch")
POSITION = Pool("position")
RUNNING = Pool("running")
NOTHING = Pool("nothing")


def per_group(channels: int, *, centred: bool = True) -> Pool:
    """The pool of one sample's ``channels`` consecutive channels and all their positions."""
    return Pool("group", channels, centred)


@dataclass(frozen=True)
class Rule:
    """What a norm pools over in train mode and in eval mode."""

    train: Pool
    eval: Pool

    @classmethod
    def always(cls, pool: Pool) -> Rule:
        """The rule of a norm that does the same in both modes."""
        return cls(pool, pool)
