"""Putting the statistics of batches together: exactly pooled, averaged, or as training does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from normswap.errors import StatisticsError

__all__ = ["Accumulator", "Average", "Batch", "Ema", "Mergeable", "Pooled", "Terms", "precise"]


@dataclass(frozen=True)
class Batch:
    """What one call of a norm measured.

    Args:
        count: values that each channel's mean is over.
        samples: samples in the batch.
        mean: (C,), in double precision.
        var: unbiased variance (C,), in double precision; zero where ``count`` is one.
    """

    count: int
    samples: int
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Terms:
    """What one batch contributes to statistics that are weighted averages over the batches.

    Args:
        weight: of the batch.
        mean: its term of the mean (C,).
        var: its term of the variance (C,).
    """

    weight: int
    mean: Tensor
    var: Tensor


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

    def __init__(self, num_features: int, device: torch.device) -> None:
        super().__init__(num_features, num_features, device)

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Take in one batch."""

    @abstractmethod
    def terms(self, batch: Batch) -> Terms:
        """What a batch contributes, by the mean as it is now."""

    @abstractmethod
    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, (C,) each, in double precision.

        Raises:
            StatisticsError: too little was seen for a variance.
        """


class Pooled(Accumulator):
    """Exact mean and total variance of all values, by Chan's rule.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979. ``weight`` counts values, ``spread`` is the sum of squared deviations.
    """

    def add(self, batch: Batch) -> None:
        """Take in one batch, single values included."""
        self.calls += 1
        count = torch.full_like(self.weight, batch.count)
        self.merge(count, batch.mean, batch.var * (batch.count - 1))

    def terms(self, batch: Batch) -> Terms:
        """Weighted by values: the mean, and the mean square deviation from the mean of all."""
        within = batch.var * ((batch.count - 1) / batch.count)
        return Terms(batch.count, batch.mean, within + (batch.mean - self.mean).square())

    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in a count, a mean and a sum of squared deviations."""
        total = self.weight + weight
        if total == 0:
            return
        delta = mean - self.mean
        self.mean = self.mean + delta * (weight / total)
        self.spread = self.spread + spread + delta.square() * (self.weight * weight / total)
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

    def __init__(
        self, num_features: int, device: torch.device, *, by_samples: bool = False
    ) -> None:
        super().__init__(num_features, device)
        self._by_samples = by_samples

    def add(self, batch: Batch) -> None:
        """Take in one batch, unless it is a single value."""
        self.calls += 1
        terms = self.terms(batch)
        self.merge(torch.full_like(self.weight, terms.weight), terms.mean, terms.var)

    def terms(self, batch: Batch) -> Terms:
        """Mean and variance themselves, weighted by one or by samples."""
        weight = batch.samples if self._by_samples else 1
        return Terms(weight if batch.count > 1 else 0, batch.mean, batch.var)

    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in a weight, a mean of means and a mean of variances."""
        total = self.weight + weight
        if total == 0:
            return
        self.mean = self.mean + (mean - self.mean) * (weight / total)
        self.spread = self.spread + (spread - self.spread) * (weight / total)
        self.weight = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Average mean and average unbiased variance."""
        if self.weight == 0:
            raise StatisticsError("it saw no batch of two or more values per channel")
        return self.mean, self.spread


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

    def add(self, batch: Batch) -> None:
        """Move on by one batch, unless it is a single value."""
        self.calls += 1
        if batch.count < 2:
            return
        self.weight = self.weight + 1
        seen = self._batches + self.calls
        factor = 1 / seen if self._momentum is None else self._momentum
        self.mean = self.mean.lerp(batch.mean, factor)
        self.spread = self.spread.lerp(batch.var, factor)
