"""Several norms side by side: one arithmetic over all their channels takes in a whole batch."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from normswap.stats.accumulate import Accumulator, Batch, precise
from normswap.stats.measure import UNTOUCHED
from normswap.stats.scatter import Scatter

__all__ = ["Abreast", "kinds_abreast"]


class Abreast:
    """The accumulators of some norms as one vector of all their channels.

    Args:
        parts: the accumulators by their norms' paths, all of one kind. They are up to date after
            `settle` only.

    Attributes:
        scatter: how the batches differ.
    """

    def __init__(self, parts: Mapping[str, Accumulator]) -> None:
        self._parts = dict(parts)
        each = list(self._parts.values())
        self._whole = copy.copy(each[0])
        device = self._whole.mean.device
        self._sizes = [len(part.mean) for part in each]
        sizes = torch.tensor(self._sizes)
        #: of each channel the number of its norm, and of each norm its first channel
        self._norm = torch.repeat_interleave(sizes).to(device)
        self._first = (sizes.cumsum(0) - sizes).to(device)
        self._nothing = {
            path: Batch(0, 0, torch.zeros_like(part.mean), torch.full_like(part.mean, UNTOUCHED))
            for path, part in self._parts.items()
        }
        self.scatter = Scatter(len(self._norm), device, between=self._whole.between)
        self.take()

    def take(self) -> None:
        """Go on from what the norms' own accumulators have seen."""
        each = list(self._parts.values())
        self._calls = torch.tensor([part.calls for part in each], device=self._norm.device)
        self._whole.weight = torch.cat([part.weight.expand_as(part.mean) for part in each])
        self._whole.mean = torch.cat([part.mean for part in each])
        self._whole.spread = torch.cat([part.spread for part in each])

    def settle(self) -> None:
        """Let the norms' own accumulators know what was seen."""
        weights = self._whole.weight[self._first]
        means = torch.split(self._whole.mean, self._sizes)
        spreads = torch.split(self._whole.spread, self._sizes)
        for index, part in enumerate(self._parts.values()):
            part.calls = int(self._calls[index])
            part.weight, part.mean, part.spread = weights[index], means[index], spreads[index]

    def rounds(self, calls: Iterable[tuple[str, Batch]]) -> list[Batch]:
        """What the calls of one batch measured, side by side.

        Args:
            calls: paths and what was measured there, in any order; other paths do not matter.

        Returns:
            The norms' first calls, their second calls, and so on.
        """
        count = Counter[str]()
        rounds: list[dict[str, Batch]] = []
        for path, batch in calls:
            if path in self._parts:
                if count[path] == len(rounds):
                    rounds.append({})
                rounds[count[path]][path] = batch
                count[path] += 1
        return [self._side_by_side(each) for each in rounds]

    def add(self, rounds: Sequence[Batch]) -> None:
        """Take in one batch, as `rounds` returns it."""
        if not rounds:
            return
        for each in rounds:
            self._whole.add(each)
            self._calls += torch.as_tensor(each.count)[self._first] > 0
        self.scatter.settle_origin(self._whole.mean)
        self.scatter.add([self._whole.terms(each, self.scatter.origin) for each in rounds])

    def distances(self) -> dict[str, float]:
        """How many standard deviations each norm's farthest channel is from zero.

        Judged by all that was seen of them: where one batch is farther than that, as one that is
        all but constant, its rounding is nothing beside the deviation of all.
        """
        squared = self._whole.mean.square() / self._whole.variance
        squared = torch.where(self._whole.weight == 0, torch.inf, squared.nan_to_num(0))
        farthest = squared.new_zeros(len(self._sizes)).scatter_reduce(
            0, self._norm, squared, "amax"
        )
        return dict(zip(self._parts, farthest.sqrt().tolist(), strict=True))

    def errors(self) -> dict[str, tuple[float, float]]:
        """Of each norm that was reached the standard errors of its mean and variance.

        Returns:
            By path, in standard deviations and relative to the variance: root mean square over
            the channels; not a number where too few batches were seen.
        """
        squared = self.scatter.errors().square()
        norms = squared.new_zeros(2, len(self._sizes)).index_add_(1, self._norm, squared)
        errors = (norms / squared.new_tensor(self._sizes)).sqrt()
        reached = (self.scatter.sums[0, self._first] > 0).tolist()
        each = zip(self._parts, reached, *errors.tolist(), strict=True)
        return {path: (mean, var) for path, known, mean, var in each if known}

    def _side_by_side(self, batches: Mapping[str, Batch]) -> Batch:
        each = [batches.get(path, nothing) for path, nothing in self._nothing.items()]
        mean = precise(torch.cat([batch.mean for batch in each]))
        var = precise(torch.cat([batch.var for batch in each]))
        touched = var != UNTOUCHED
        numbers = [[batch.count for batch in each], [batch.samples for batch in each]]
        count, samples = torch.tensor(numbers, device=var.device)[:, self._norm] * touched
        return Batch(count.to(var), samples.to(var), mean, var * touched)


def kinds_abreast(accumulators: Mapping[str, Accumulator]) -> list[Abreast]:
    """Put accumulators side by side, each kind for itself."""
    kinds: dict[Hashable, dict[str, Accumulator]] = defaultdict(dict)
    for path, accumulator in accumulators.items():
        kinds[accumulator.kind][path] = accumulator
    return [Abreast(parts) for parts in kinds.values()]
