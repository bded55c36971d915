"""All batches through a norm before any goes on: statistics as of one giant batch.

A forward a batch is run up to the norm, where it waits until all have arrived and told what they
bring. Then the norm's statistics are final, and every forward goes on with them: one forward of
arithmetic in all, and each norm is fed by norms that use their final statistics already.

Where forwards that run side by side would disturb each other, each is run alone instead, for
every norm from the start up to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.site import NormSite
from normswap.stats.accumulate import Batch
from normswap.stats.batchwise import accumulator_for
from normswap.stats.bookmark import Bookmark
from normswap.stats.distributed import anywhere, merge_ranks
from normswap.stats.feed import Feed, batch_size, mapped
from normswap.stats.gate import Gate, NotFinite, require_finite
from normswap.stats.gathered import Gathered
from normswap.stats.lockstep import Lockstep
from normswap.stats.measure import Meter
from normswap.stats.meetings import Meetings
from normswap.stats.probe import Probe, probing
from normswap.stats.rereading import Rereading
from normswap.stats.shelf import Shelf
from normswap.stats.trial import Trial, rounding, shows_alone

__all__ = ["population"]


def population(
    model: nn.Module,
    sites: list[NormSite],
    feed: Feed,
    *,
    skip_nonfinite: bool,
    memory: int,
    bookmark: Bookmark,
    group: Any,
) -> Gathered:
    """Find the statistics of one train-mode forward of all data as a single batch.

    A norm that a forward calls several times has statistics of its own at each call, as it would
    have in that batch; its running statistics are those of all calls together. What a norm does
    sample by sample, as InstanceNorm, needs no waiting.

    Args:
        model: in eval mode throughout.
        sites: the norms that are to measure.
        feed: what is read: once, or where forwards disturb each other once for every norm.
        skip_nonfinite: leave batches out that are not finite when they reach their first norm.
        memory: bytes that waiting forwards may hold in memory; the rest goes to a file.
        bookmark: where the norms that are final are kept.
        group: the process group, whose ranks make up the batch together.

    Returns:
        What was seen, of all ranks.

    Raises:
        StatisticsError: values are not finite, batches take ways that do not meet, forwards
            disturb each other and the loader cannot be read again, or the bookmark is of another
            pass.
    """
    start = partial(_Pass, model, sites, feed, group, bookmark, Rereading(), skip_nonfinite)
    try:
        return start(memory, side_by_side=True).run()
    except _Disturbed:
        bookmark.remove()  # what it says so far may be wrong
    return start(sys.maxsize, side_by_side=False).run()


class _Disturbed(Exception):
    """Forwards that run side by side disturb each other, here or on another rank."""


class _Pass:
    """One such pass, of forwards that run side by side or each alone."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[NormSite],
        feed: Feed,
        group: Any,
        bookmark: Bookmark,
        rereading: Rereading,
        skip_nonfinite: bool,
        memory: int,
        *,
        side_by_side: bool,
    ) -> None:
        self._model, self._sites, self._feed, self._group = model, sites, feed, group
        self._bookmark, self._rereading = bookmark, rereading
        self._skip_nonfinite, self._side_by_side = skip_nonfinite, side_by_side
        dtypes = {site.state.reference().dtype for site in sites}
        self._rounding = rounding(dtypes, amp=bool(feed.amp))
        self._trial = Trial(self._apart, self._rounding) if side_by_side else None
        self._witness: Any = None
        self._shelf = Shelf(memory, model)
        self._meetings = Meetings(sites, bookmark, group)
        self._lockstep = Lockstep(
            self._shelf,
            group,
            [site.label for site in sites],
            'use method="pooled", which needs no waiting',
            self._meetings.answers(),
            staying=side_by_side,
        )
        self._passing: list[tuple[NormSite, Batch]] = []
        self._waits = [site.state.rule.train.meets for site in sites]
        self._probes: list[Probe] = [
            Gate(site, place) if waits else Meter(site, self._pass)
            for place, (site, waits) in enumerate(zip(sites, self._waits, strict=True))
        ]
        by_path = {site.path: site for site in sites}
        self._nothing_after = (
            feed.forward is None and all(self._waits) and all(site.certainly_once for site in sites)
        )
        self._nothing = partial(Gathered, lambda path: accumulator_for(by_path[path], "pooled"))
        self._gathered = self._nothing(passes=0)

    def run(self) -> Gathered:
        """Run all forwards; return what was seen, norm by norm.

        Raises:
            _Disturbed: they have to run alone.
        """
        try:
            with probing(self._probes), self._lockstep:
                self._read()
                while self._lockstep.settle(self._meetings.settle):
                    if not self._side_by_side:
                        self._lockstep.give_up()
                        self._read()
                    elif self._seems_enough() and self._first_ends():
                        break
                    else:
                        self._lockstep.go_on()
                if self._side_by_side and anywhere(self._is_refuted(), self._group):
                    raise _Disturbed
        finally:
            self._shelf.clear()
        return self._result()

    def _read(self) -> None:
        """Read the loader, each batch up to the first norm that is not final."""
        self._gathered = self._nothing(passes=self._gathered.passes + 1)
        self._bookmark.rewind()
        self._rereading.rewind()
        disturbed = False
        with closing(iter(self._feed)) as batches:
            for index, batch in enumerate(batches):
                self._bookmark.turn(batch)
                self._rereading.turn(batch)
                kept = self._start(batch, index)
                self._gathered.count(index, batch_size(batch), kept=kept)
                if kept and self._trial is not None:
                    disturbed = self._trial.fails(batch)
                    self._passing.clear()
                    if disturbed:
                        break
        if self._trial is not None and anywhere(disturbed, self._group):
            raise _Disturbed
        self._bookmark.close()
        self._rereading.close()

    def _start(self, batch: Any, index: int) -> bool:
        """Start a batch's forward; return whether the batch is sound."""
        if self._witness is None and self._side_by_side and batch_size(batch):
            self._witness = mapped(batch, Tensor.clone)
            self._lockstep.witness = index
        try:
            self._lockstep.start(self._forward(batch), index)
        except NotFinite:
            if self._lockstep.witness == index:
                self._witness = None
            self._passing.clear()
            if not self._skip_nonfinite or self._lockstep.met > 1:
                raise
            return False
        self._take_passing()
        return True

    def _is_refuted(self) -> bool:
        """Whether the first forward shows other things when it runs alone."""
        if self._gathered.batches < 2 or not self._lockstep.testimony:
            return False
        self._take_passing()
        try:
            return not shows_alone(
                self._apart,
                self._witness,
                self._meetings.answers(),
                self._lockstep.testimony,
                self._rounding,
            )
        finally:
            self._passing.clear()

    def _forward(self, batch: Any) -> Callable[[], None]:
        """A forward on a batch of its own, which nobody else holds or is changed by it."""
        return partial(_run, self._feed, self._model, [batch])

    def _apart(self, batch: Any) -> Callable[[], object]:
        """Such a forward that is none of the pass's."""
        return self._shelf.holder().making(self._forward(batch))

    def _seems_enough(self) -> bool:
        """Whether all norms are final, and the graph says that each is called only once."""
        return self._nothing_after and len(self._meetings) == len(self._sites)

    def _first_ends(self) -> bool:
        """Whether a whole forward on every rank shows that nothing more is measured."""
        self._lockstep.go_on(1)
        return not anywhere(self._lockstep.waits, self._group)

    def _result(self) -> Gathered:
        self._take_passing()
        passed = [
            self._gathered.of(site.path)
            for site, waits in zip(self._sites, self._waits, strict=True)
            if not waits
        ]
        merge_ranks(passed, self._group)
        self._meetings.add_to(self._gathered)
        for site in self._sites:
            self._gathered.of(site.path)
        return self._gathered

    def _pass(self, site: NormSite, batch: Batch) -> None:
        require_finite(site, batch, self._lockstep.index)
        # Unseen by the forward's watch: else the copy would be put aside with what it made.
        with torch._C.DisableTorchFunction():
            self._passing.append((site, batch.precise()))

    def _take_passing(self) -> None:
        for site, batch in self._passing:
            if batch.count:
                self._gathered.of(site.path).add(batch)
        self._passing.clear()


def _run(feed: Feed, model: nn.Module, box: list[Any]) -> None:
    feed.run(model, mapped(box.pop(), Tensor.clone))
