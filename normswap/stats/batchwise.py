"""Batch by batch: every norm measures each batch as it comes, and no forward waits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from itertools import chain
from typing import Any, Literal

from torch import nn

from normswap.errors import StatisticsError
from normswap.graph.site import NormSite
from normswap.stats.abreast import kinds_abreast
from normswap.stats.accumulate import Accumulator, Average, Batch, Ema, Pooled, precise
from normswap.stats.bookmark import Bookmark
from normswap.stats.distributed import all_well, merge_ranks
from normswap.stats.feed import Feed, batch_size
from normswap.stats.gathered import Gathered
from normswap.stats.measure import Meter, Receive
from normswap.stats.probe import probing
from normswap.stats.writing import statistics_of

__all__ = ["accumulator_for", "batchwise"]


def batchwise(
    model: nn.Module,
    sites: list[NormSite],
    feed: Feed,
    *,
    method: Literal["ema", "average", "pooled"],
    skip_nonfinite: bool,
    tol: float | None,
    bookmark: Bookmark,
    group: Any,
) -> Gathered:
    """Read a loader once and put together what the norms measure of each batch.

    Args:
        model: in eval mode throughout.
        sites: the norms that are to measure.
        feed: what is read.
        method: how it is put together.
        skip_nonfinite: leave batches out that are not finite, not raise.
        tol: stop when the statistics are known to this tolerance.
        bookmark: where the way so far is kept.
        group: the process group to merge over.

    Returns:
        What was seen, of all ranks.

    Raises:
        StatisticsError: values are not finite, or the bookmark is of another pass.
    """
    accumulators = {site.path: accumulator_for(site, method) for site in sites}
    gathered = Gathered(accumulators.__getitem__, accumulators, kinds_abreast(accumulators))
    bookmark.load(gathered)
    # Where the graph shows each norm called exactly once, nothing comes after the last of them.
    # Where it does not, batches may take different ways, and forwards run to the end.
    once = feed.forward is None and all(site.certainly_once for site in sites)
    meters = partial(Meter, plain=method != "ema")
    collector = _Collector(gathered, sites, meters, most=len(sites) if once else None)
    known = gathered.convergence
    with closing(_unread(feed, bookmark)) as unread, probing(collector.meters):
        while (tol is None or not known.within(tol)) and (page := next(unread, None)):
            index, batch = page
            collector.open_batch()
            with suppress(_LastNormReached):
                feed.run(model, batch)
            sound = collector.close_batch(index, skip_nonfinite)
            gathered.count(index, batch_size(batch), kept=sound)
            if tol is not None or gathered.batches.bit_count() == 1:  # else 1, 2, 4, 8, ...
                known.look(gathered.samples)
            bookmark.save(gathered)
    known.look(gathered.samples)
    gathered.settle()
    all_well(group)
    merge_ranks(list(accumulators.values()), group)
    return gathered


def _unread(feed: Feed, bookmark: Bookmark) -> Generator[tuple[int, Any], None, None]:
    """The batches after those that a bookmark knows, with their numbers."""
    with closing(iter(feed)) as batches:
        for index, batch in enumerate(batches):
            if not bookmark.turn(batch):
                yield index, batch
    bookmark.close()


def accumulator_for(site: NormSite, method: Literal["ema", "average", "pooled"]) -> Accumulator:
    """What puts a norm's batches together by a method."""
    mean, var = statistics_of(site)
    if method == "ema":
        tracked = site.state.num_batches_tracked
        seen = 0 if tracked is None else int(tracked)
        return Ema(mean, var, momentum=site.state.momentum, batches=seen)
    # Statistics of single samples are averaged over samples: there is no variance between them
    # in what InstanceNorm keeps.
    by_samples = not site.state.rule.train.meets
    if by_samples or method == "average":
        weighted = by_samples and method == "pooled"
        return Average(site.num_features, precise(mean).device, by_samples=weighted)
    return Pooled(site.num_features, precise(mean).device)


class _LastNormReached(BaseException):
    """Ends a forward once nothing is left in it to measure; no ``except Exception`` stops it."""


class _Collector:
    """Gathers what the norms measure, and lets it count once the batch proves sound.

    Args:
        gathered: where it counts.
        sites: the norms.
        meter: makes what measures at a norm, and is told whom to tell.
        most: how many calls there are in a forward, if that is known; no forward goes on after.
    """

    def __init__(
        self,
        gathered: Gathered,
        sites: list[NormSite],
        meter: Callable[[NormSite, Receive], Meter],
        *,
        most: int | None,
    ) -> None:
        self.meters = [meter(site, self._receive) for site in sites]
        self._gathered = gathered
        self._most = most
        self._pending: list[tuple[NormSite, Batch]] = []
        self._saw_whole_forward = False

    def _receive(self, site: NormSite, batch: Batch) -> None:
        """Take what one call measured; end the forward if it was the last."""
        self._pending.append((site, batch))
        if self._saw_whole_forward and len(self._pending) == self._most:
            raise _LastNormReached

    def open_batch(self) -> None:
        """Make ready for the next batch."""
        for meter in self.meters:
            meter.ready()
        if self._gathered.batches:
            distances = dict(
                chain.from_iterable(r.distances().items() for r in self._gathered.rows)
            )
            for meter in self.meters:
                meter.distance = distances[meter.site.path]

    def close_batch(self, index: int, skip_nonfinite: bool) -> bool:
        """Take in what the batch brought; return whether it counts."""
        pending, self._pending = self._pending, []
        # What a graph cannot know, such as how many inputs a list holds, a whole forward shows.
        if not self._saw_whole_forward:
            self._saw_whole_forward = True
            self._most = self._most if len(pending) == self._most else None
        rows = self._gathered.rows
        rounds = [row.rounds((s.path, batch) for s, batch in pending) for row in rows]
        if not all(map(_is_finite, chain.from_iterable(rounds))):
            if skip_nonfinite:
                return False
            site = next(site for site, batch in pending if not _is_finite(batch))
            raise StatisticsError(
                f"{site.label}: values that are not finite in batch {index} (counted from 0); "
                'mend the data or the model, or leave such batches out by on_nonfinite="skip"'
            )
        for row, each in zip(rows, rounds, strict=True):
            row.add(each)
        return True


def _is_finite(batch: Batch) -> bool:
    return bool((batch.mean + batch.var).isfinite().all())
