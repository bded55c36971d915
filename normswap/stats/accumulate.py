"""Putting the statistics of batches together: exactly pooled, averaged, or as training does.

The weight of an accumulator is one number, or one for each channel: several norms side by side
are added to by the same arithmetic as one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normswap.errors import StatisticsError

__all__ = ["Accumulator", "Average", "Batch", "Ema", "Mergeable", "Pooled", "Terms", "precise"]


@dataclass(frozen=True)
class Batch:
    """What one call of a norm measured, or one call of each of several norms side by side.

    Args:
        count: values that each channel's mean is over; or a number for each channel (C,), zero
            where nothing was measured.
        samples: samples in the batch, likewise.
        mean: (C,).
        var: unbiased variance (C,); zero where ``count`` is one.
    """

    count: int | Tensor
    samples: int | Tensor
    mean: Tensor
    var: Tensor

    def precise(self) -> Batch:
        """A copy in double precision."""
        return Batch(self.count, self.samples, precise(self.mean), precise(self.var))


@dataclass(frozen=True)
class Terms:
    """What one batch contributes to weighted averages that the statistics follow from.

    Args:
        weight: of the batch (C,).
        mean: its mean, from an origin (C,).
        square: its mean squared deviation from that origin, or where the variance between the
            batches' means is not part of the statistics, its variance (C,).
    """

    weight: Tensor
    mean: Tensor
    square: Tensor


def precise(tensor: Tensor) -> Tensor:
    """A copy in double precision, on the same device where that has it."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.detach().to(torch.float64, copy=True)


class Mergeable(ABC):
    """Numbers about what was seen, in double precision, that merge with those of others.

    Args:
        means: how many means there are.
        spreads: how many spreads there are.
        device: where they are.
    """

    def __init__(self, means: int, spreads: int, device: torch.device) -> None:
        #: batches taken in on this rank
        self.calls = 0
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = self.weight.new_zeros(means)
        self.spread = self.weight.new_zeros(spreads)

    def forget(self) -> None:
        """Go back to having seen nothing, before a merge of all ranks."""
        self.calls = 0
        self.weight = torch.zeros_like(self.weight)
        self.mean = torch.zeros_like(self.mean)
        self.spread = torch.zeros_like(self.spread)

    @abstractmethod
    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in the numbers of another of the same kind."""


class Accumulator(Mergeable):
    """Takes in batches one by one, and makes statistics of them."""

    #: whether the variance includes that between the batches' means
    between: ClassVar[bool]

    def __init__(self, num_features: int, device: torch.device) -> None:
        super().__init__(num_features, num_features, device)

    @property
    def kind(self) -> Hashable:
        """Equal for accumulators that can stand side by side in one."""
        return type(self), self.mean.device

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """The variance of what was seen so far (C,), if anything was."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Take in one batch."""

    def add_all(self, batches: Sequence[Batch]) -> None:
        """Take in many batches."""
        for batch in batches:
            self.add(batch)

    @abstractmethod
    def terms(self, batch: Batch, origin: Tensor) -> Terms:
        """What a batch contributes, seen from an origin (C,)."""

    @abstractmethod
    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, (C,) each, in double precision.

        Raises:
            StatisticsError: too little was seen for a variance.
        """

    def _number(self, value: int | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self.mean.device)


class Pooled(Accumulator):
    """Exact mean and total variance of all values, by Chan's rule.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979. ``weight`` counts values, ``spread`` is the sum of squared deviations.
    """

    between = True

    @property
    def variance(self) -> Tensor:
        """Biased."""
        return self.spread / self.weight.clamp(min=1)

    def add(self, batch: Batch) -> None:
        """Take in one batch, single values included."""
        self.calls += 1
        count = self._number(batch.count)
        self.merge(count, batch.mean, batch.var * (count - 1))

    def add_all(self, batches: Sequence[Batch]) -> None:
        """Take in many batches at once."""
        if not batches:
            return
        self.calls += len(batches)
        count = self.mean.new_tensor([batch.count for batch in batches])[:, None]
        mean = torch.stack([batch.mean for batch in batches])
        var = torch.stack([batch.var for batch in batches])
        total = count.sum()
        middle = (count * mean).sum(0) / total
        spread = (var * (count - 1) + count * (mean - middle).square()).sum(0)
        self.merge(total, middle, spread)

    def terms(self, batch: Batch, origin: Tensor) -> Terms:
        """Weighted by values: the mean, and the mean square deviation."""
        count, mean = self._number(batch.count), batch.mean - origin
        within = batch.var * ((count - 1) / count.clamp(min=1))
        return Terms(count, mean, within + mean.square())

    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in a count, a mean and a sum of squared deviations."""
        total = self.weight + weight
        share = weight / total.clamp(min=1)
        delta = mean - self.mean
        self.mean = self.mean + delta * share
        self.spread = self.spread + spread + delta.square() * (self.weight * share)
        self.weight = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of everything seen."""
        if self.weight < 2:
            raise StatisticsError(
                f"it saw {int(self.weight)} values per channel, and a variance takes two or more"
            )
        return self.mean, self.spread / (self.weight - 1)


class Average(Accumulator):
    """Mean of the batches' means and of their variances; ``weight`` counts batches or samples.

    A batch of one value has no variance, and is left out.

    Args:
        by_samples: weigh each batch by its samples, not all the same.
    """

    between = False

    def __init__(
        self, num_features: int, device: torch.device, *, by_samples: bool = False
    ) -> None:
        super().__init__(num_features, device)
        self._by_samples = by_samples

    @property
    def variance(self) -> Tensor:
        """Average unbiased variance."""
        return self.spread

    @property
    def kind(self) -> Hashable:
        """Also what batches are weighed by."""
        return super().kind, self._by_samples

    def add(self, batch: Batch) -> None:
        """Take in one batch, unless it is a single value."""
        self.calls += 1
        self.merge(self._weight(batch), batch.mean, batch.var)

    def terms(self, batch: Batch, origin: Tensor) -> Terms:
        """Mean and variance themselves, weighted by one or by samples."""
        return Terms(self._weight(batch), batch.mean - origin, batch.var)

    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in a weight, a mean of means and a mean of variances."""
        total = self.weight + weight
        share = weight / total.clamp(min=1)
        self.mean = self.mean + (mean - self.mean) * share
        self.spread = self.spread + (spread - self.spread) * share
        self.weight = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Average mean and average unbiased variance."""
        if self.weight == 0:
            raise StatisticsError("it saw no batch of two or more values per channel")
        return self.mean, self.spread

    def _weight(self, batch: Batch) -> Tensor:
        weight = self._number(batch.samples if self._by_samples else 1)
        return weight * (self._number(batch.count) > 1)


class Ema(Average):
    """The moving average that training keeps, going on from the running statistics there are.

    Args:
        momentum: weight of the newest batch; ``None`` is the cumulative average.
        mean: running mean to go on from, (C,).
        var: running variance to go on from, (C,).
        batches: how many batches these have seen.
    """

    def __init__(self, mean: Tensor, var: Tensor, *, momentum: float | None, batches: int) -> None:
        super().__init__(len(mean), precise(mean).device)
        self._momentum = momentum
        self._batches = batches
        self.mean, self.spread = precise(mean), precise(var)

    @property
    def kind(self) -> Hashable:
        """Also how the average moves."""
        return super().kind, self._momentum, self._batches

    def add(self, batch: Batch) -> None:
        """Move on by one batch, unless it is a single value."""
        self.calls += 1
        moves = self._weight(batch)
        self.weight = self.weight + moves
        seen = self.weight + self._batches
        factor = 1 / seen.clamp(min=1) if self._momentum is None else self._momentum
        self.mean = self.mean.lerp(batch.mean, moves * factor)
        self.spread = self.spread.lerp(batch.var, moves * factor)

    def terms(self, batch: Batch, origin: Tensor) -> Terms:
        """Nothing: a moving average never settles."""
        return Terms(torch.zeros_like(origin), batch.mean - origin, batch.var)
