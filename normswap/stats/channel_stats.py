"""Mean and standard deviation of the channels of a data set, as a value that can be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from normswap.errors import MissingExtra, OptionError, StatisticsError
from normswap.stats.accumulate import Pooled
from normswap.table import render

__all__ = ["DatasetStats", "pooled_stats"]


@dataclass(frozen=True, repr=False)
class DatasetStats:
    """What `normswap.dataset_stats` found; prints as a table.

    It is a value: equal to another with the same numbers, hashable, and merged with others by
    `merge`, ``+`` or ``sum``, exactly and in any order, as if all their data had been read at once.

    Args:
        count: values that each channel's mean is over, on all ranks.
        samples: samples that were read, on all ranks.
        skipped: batches left out because of values that are not finite, on all ranks.
        means: the mean of each channel.
        spreads: the sum of each channel's squared deviations from it.
    """

    count: int
    samples: int
    skipped: int
    means: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (C,), in double precision."""
        return torch.tensor(self.means, dtype=torch.float64)

    @property
    def var(self) -> Tensor:
        """Unbiased variance of each channel, over ``count - 1``, (C,), in double precision."""
        return torch.tensor(self.spreads, dtype=torch.float64) / (self.count - 1)

    @property
    def std(self) -> Tensor:
        """Square root of `var`, (C,), in double precision."""
        return self.var.sqrt()

    def merge(self, other: DatasetStats) -> DatasetStats:
        """The statistics of the data of both.

        Raises:
            StatisticsError: they have different numbers of channels.
        """
        if len(self.means) != len(other.means):
            raise StatisticsError(
                f"statistics of {len(self.means)} channels and of {len(other.means)} do not "
                "merge; they describe data of different kinds"
            )
        both = Pooled(len(self.means), torch.device("cpu"))
        for one in (self, other):
            spread = torch.tensor(one.spreads, dtype=torch.float64)
            both.merge(torch.tensor(one.count, dtype=torch.float64), one.mean, spread)
        return pooled_stats(
            both, samples=self.samples + other.samples, skipped=self.skipped + other.skipped
        )

    def __add__(self, other: object) -> DatasetStats:
        return self.merge(other) if isinstance(other, DatasetStats) else NotImplemented

    def __radd__(self, other: object) -> DatasetStats:
        # Where sum() begins.
        return self if other == 0 else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, to the last bit; `from_dict` reads it again."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> DatasetStats:
        """What `to_dict` made a dictionary of.

        Raises:
            OptionError: it has other keys.
        """
        expected = [field.name for field in fields(cls)]
        if sorted(numbers) != sorted(expected):
            raise OptionError(
                f"statistics of a data set have the keys {expected}, not {sorted(numbers)}; "
                "give what to_dict() returned"
            )
        lists = {key: tuple(numbers[key]) for key in ("means", "spreads")}
        return cls(**{**numbers, **lists})

    def as_timm(self) -> dict[str, tuple[float, ...]]:
        """Mean and std as timm takes them: ``timm.data.create_transform(224, **stats.as_timm())``.

        timm applies them to images in 0..1, which is how `normswap.dataset_stats` counts uint8.

        Raises:
            StatisticsError: a channel is constant.
        """
        return {"mean": self.means, "std": self._divisors()}

    def as_transform(self) -> Any:
        """A `torchvision.transforms.Normalize` that gives this data mean 0 and deviation 1.

        Of uint8 images it takes those in 0..1, as ``ToTensor`` makes them.

        Raises:
            StatisticsError: a channel is constant.
            MissingExtra: torchvision is not installed.
        """
        divisors = self._divisors()
        try:
            transforms = import_module("torchvision.transforms")
        except ImportError as error:
            raise MissingExtra(
                "as_transform() makes a transform of torchvision, not installed here; "
                "get it by: pip install torchvision"
            ) from error
        return transforms.Normalize(self.means, divisors)

    def _divisors(self) -> tuple[float, ...]:
        """The standard deviations, where all of them can divide."""
        constant = [channel for channel, spread in enumerate(self.spreads) if spread == 0]
        if constant:
            raise StatisticsError(
                f"channel {constant[0]} is constant (std 0), and dividing by that makes nan; leave "
                "the channel out of the data, or choose a std yourself beside stats.mean"
            )
        return tuple(self.std.tolist())

    def __repr__(self) -> str:
        return f"<DatasetStats: {self._summary()}>"

    def __str__(self) -> str:
        numbers = zip(self.means, self.std.tolist(), strict=True)
        rows = [(channel, f"{m:.6g}", f"{s:.6g}") for channel, (m, s) in enumerate(numbers)]
        columns = ("channel", "mean", "std")
        return render("Data set", columns, rows, footer=self._summary())

    def _summary(self) -> str:
        skipped = f", {self.skipped} batches skipped" if self.skipped else ""
        return (
            f"{len(self.means)} channels of {self.count} values each, "
            f"from {self.samples} samples{skipped}"
        )


def pooled_stats(pooled: Pooled, *, samples: int, skipped: int) -> DatasetStats:
    """The numbers of an accumulator, and how many samples and batches they are of or without."""
    return DatasetStats(
        count=int(pooled.weight),
        samples=samples,
        skipped=skipped,
        means=tuple(pooled.mean.tolist()),
        spreads=tuple(pooled.spread.tolist()),
    )
