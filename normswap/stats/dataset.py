"""Mean and standard deviation of what a loader yields, per channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from normswap.errors import OptionError, StatisticsError
from normswap.stats.accumulate import Pooled, precise
from normswap.stats.channel_stats import DatasetStats, pooled_stats
from normswap.stats.distributed import all_well, failing_together, first_of_all, merge_ranks
from normswap.stats.feed import batches_of, moved
from normswap.stats.inputs import Inputs, Select

__all__ = ["dataset_stats"]

#: As many values are held in double precision at a time (2 MiB, which caches hold), or one slice.
AT_ONCE = 2**18
WHITE = 255


def dataset_stats(
    loader: Iterable[Any],
    *,
    key: str | None = None,
    mask: str | None = "auto",
    select: Select | None = None,
    channel_dim: int | None = None,
    batches: int | None = None,
    samples: int | None = None,
    device: torch.device | str | None = None,
    group: Any = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> DatasetStats:
    """Compute mean and standard deviation per channel of what a loader yields, in one pass.

    In double precision by Chan's rule, whatever the precision of the data: independent of how the
    data is cut into batches and spread over ranks, and exact far from zero. What counts is what
    the loader yields, so leave a ``Normalize`` and random augmentations out of its transforms.
    Integers in 0..255 (uint8) are counted as 0..1, as torchvision's ``ToTensor`` makes them.

    Args:
        loader: any iterable of batches. A batch that is a tensor, or an array of NumPy, is taken
            as it is; of a tuple or list the first item; of a mapping one entry.
        key: the entry of a mapping. Default: ``pixel_values``, ``image``, ``images``,
            ``input_features`` or ``input_values``, else the first tensor of floating point or
            uint8 numbers with two dimensions or more whose key does not end in "mask".
        mask: the entry of a mapping that tells by nonzero which values are real; the others, be
            they nan, do not count at all. It has the shape of the data without the channels, or
            with one. ``"auto"``: ``pixel_mask`` or ``attention_mask`` if there is one (not that of
            a text: one in the shape of ``input_ids`` that does not fit the data). ``None``: none.
        select: ``select(batch)`` returns the data, or data and mask, of batches that are
            otherwise, such as those whose mask is nonzero where padding is.
        channel_dim: the dimension of the channels. Default: 1 of (N, C), (N, C, H, W) and
            (N, C, D, H, W), the last of sequences (N, T, C). Data that looks otherwise, such as
            images with their channels last, is refused until it is said. 0: each batch is one
            sample, as in a ``Dataset`` that yields images (C, H, W).
        batches: read at most as many batches.
        samples: stop after the batch that reaches as many samples.
        device: where batches are moved and measured. Default: where they are.
        group: the process group to merge over, every rank with its own loader, which may be
            empty. Default: the default one, if there is one.
        on_nonfinite: what to do about a batch with values that are not finite: ``"raise"``, or
            ``"skip"`` and count it in the result.
        progress: show a progress bar in a terminal.

    Returns:
        Mean and unbiased variance per channel, with the count; equal on all ranks.

    Raises:
        StatisticsError: data that is no numbers, not finite, of unclear layout, of different
            numbers of channels, or of fewer than two values per channel; names the batch.
        OptionError: an argument has a value that it cannot take, or does not fit the batch.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise OptionError(f'on_nonfinite={on_nonfinite!r} is neither "raise" nor "skip"')
    inputs = Inputs(loader, key, mask, select, channel_dim)
    stream = batches_of(
        inputs, batches=batches, samples=samples, progress=progress, title="Data set"
    )
    with failing_together(group):
        seen = _Seen()
        for index, batch in enumerate(stream):
            values, real = batch if device is None else moved(batch, torch.device(device))
            seen.take(index, values, real, skip_nonfinite=on_nonfinite == "skip")
        stats = seen.on_all_ranks(group)
    if stats.count < 2:
        raise StatisticsError(
            f"the loader yielded {stats.count} values per channel, and a variance takes two or "
            "more; feed more data"
        )
    return stats


class _Seen:
    """What has been read so far on this rank."""

    def __init__(self) -> None:
        self.pooled: Pooled | None = None
        self.samples = 0
        self.skipped = 0

    def take(
        self, index: int, values: Tensor, real: Tensor | None, *, skip_nonfinite: bool
    ) -> None:
        """Take in one batch of values (N, C, ...)."""
        batch = _measured(values, real)
        bad = (~(batch.mean + batch.spread).isfinite()).nonzero().flatten().tolist()
        if bad and skip_nonfinite:
            self.skipped += 1
            return
        if bad:
            raise StatisticsError(
                f"batch {index} (counted from 0): values that are not finite in channel {bad[0]}; "
                'mend the data, or leave such batches out by on_nonfinite="skip"'
            )
        if self.pooled is None:
            self.pooled = Pooled(len(batch.mean), batch.mean.device)
        if len(batch.mean) != len(self.pooled.mean):
            raise StatisticsError(
                f"batch {index} (counted from 0): {len(batch.mean)} channels, and "
                f"{len(self.pooled.mean)} before it; is channel_dim= right?"
            )
        self.pooled.merge(batch.weight, batch.mean, batch.spread)
        self.samples += len(values)

    def on_all_ranks(self, group: Any) -> DatasetStats:
        """All that was read, the same on every rank."""
        mine = None if self.pooled is None else len(self.pooled.mean)
        found = first_of_all(None if mine is None else (mine, 0), group)
        if found is None:
            raise StatisticsError(
                "no data: is the loader empty or used up, or was every batch skipped?"
            )
        width = found[0]
        if mine not in (None, width):
            raise StatisticsError(f"{mine} channels on this rank, and {width} on another")
        all_well(group)
        pooled = self.pooled or Pooled(width, torch.device("cpu"))
        # Of an accumulator without channels nothing is left to merge but its calls, which add up.
        samples, skipped = (Pooled(0, pooled.mean.device) for _ in range(2))
        samples.calls, skipped.calls = self.samples, self.skipped
        merge_ranks([pooled, samples, skipped], group)
        return pooled_stats(pooled, samples=samples.calls, skipped=skipped.calls)


def _measured(values: Tensor, real: Tensor | None) -> Pooled:
    """Count, mean and sum of squared deviations of one batch (N, C, ...), per channel."""
    pooled = Pooled(values.shape[1], precise(values[:0]).device)
    for part, counted in _parts(values.transpose(0, 1), real):
        rows = precise(part.flatten(1) if counted is None else part[:, counted])
        if not rows.numel():
            continue
        # From an origin among the values, those of a constant channel are zero, and so is their
        # spread; without it rounding would leave a little.
        origin = rows[:, :1].clone()
        mean = rows.sub_(origin).mean(1, keepdim=True)
        spread = rows.sub_(mean).square_().sum(1)
        count = torch.full_like(pooled.weight, rows.shape[1])
        pooled.merge(count, (origin + mean).squeeze(1), spread)
    if values.dtype == torch.uint8:
        pooled.mean, pooled.spread = pooled.mean / WHITE, pooled.spread / WHITE**2
    return pooled


def _parts(values: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Values (C, N, ...) and their mask (N, ...) in slices of their longest dimension."""
    longest = max(range(1, values.ndim), key=lambda dim: values.shape[dim])
    length = values.shape[longest]
    size = max(1, AT_ONCE * length // max(values.numel(), 1))
    parts = torch.split(values, size, longest)
    reals = repeat(None, len(parts)) if real is None else torch.split(real, size, longest - 1)
    return zip(parts, reals, strict=True)
