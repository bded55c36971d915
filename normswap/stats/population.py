"""All batches through a norm before any goes on: statistics as of one giant batch.

A forward a batch is run up to the norm, where it waits until all have arrived and told what they
bring. Then the norm's statistics are final, and every forward goes on with them: one forward of
arithmetic in all, and each norm is fed by norms that use their final statistics already.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.graph.site import NormSite
from normswap.stats.accumulate import Accumulator, Batch, Pooled
from normswap.stats.batchwise import accumulator_for
from normswap.stats.bookmark import Bookmark
from normswap.stats.distributed import first_of_all, merge_ranks
from normswap.stats.feed import Feed, batch_size, mapped
from normswap.stats.gathered import Gathered
from normswap.stats.lockstep import Key, LateArrival, Lockstep
from normswap.stats.measure import Meter
from normswap.stats.moments import channel_moments
from normswap.stats.probe import Probe, probing
from normswap.stats.shelf import Shelf

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
        feed: what is read, once.
        skip_nonfinite: leave batches out that are not finite when they reach their first norm.
        memory: bytes that waiting forwards may hold in memory; the rest goes to a file.
        bookmark: where the norms that are final are kept.
        group: the process group, whose ranks make up the batch together.

    Returns:
        What was seen, of all ranks.

    Raises:
        StatisticsError: values are not finite, batches take ways that do not meet, or the
            bookmark is of another pass.
    """
    run = _Population(model, sites, feed, group, Shelf(memory), bookmark)
    try:
        with run.shelf, probing(run.probes):
            run.read(skip_nonfinite)
            run.lockstep.run(run.settle, enough=run.enough)
    finally:
        run.lockstep.give_up()
        run.shelf.clear()
    return run.result()


class _Population:
    """One such pass."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[NormSite],
        feed: Feed,
        group: Any,
        shelf: Shelf,
        bookmark: Bookmark,
    ) -> None:
        self.shelf = shelf
        self._model, self._sites, self._feed, self._group = model, sites, feed, group
        self._bookmark = bookmark
        self._meetings = Gathered(self._pooled)
        bookmark.load(self._meetings)
        self.lockstep = Lockstep(shelf, group, self._known())
        self._passing: list[tuple[NormSite, Batch]] = []
        self._waits = [site.state.rule.train.over == "batch" for site in sites]
        self.probes: list[Probe] = [
            _Gate(site, place, self.lockstep) if waits else Meter(site, self._pass)
            for place, (site, waits) in enumerate(zip(sites, self._waits, strict=True))
        ]
        by_path = {site.path: site for site in sites}
        self._nothing_after = (
            feed.forward is None and all(self._waits) and all(site.certainly_once for site in sites)
        )
        self._gathered = Gathered(lambda path: accumulator_for(by_path[path], "pooled"))

    def read(self, skip_nonfinite: bool) -> None:
        """Read the loader, each batch up to the first norm that is not final."""
        with closing(iter(self._feed)) as batches:
            for index, batch in enumerate(batches):
                self._bookmark.turn(batch)
                size, box = batch_size(batch), [batch]
                del batch
                if index in self._meetings.left_out:
                    self._gathered.count(index, size, kept=False)
                    continue
                try:
                    self.lockstep.start(partial(_run, self._feed, self._model, box), index)
                except _NotFinite:
                    if not skip_nonfinite or self._meetings.accumulators:
                        raise
                    self._passing.clear()
                    self._gathered.count(index, size, kept=False)
                else:
                    self._take_passing()
                    self._gathered.count(index, size, kept=True)
        self._bookmark.close()

    def settle(self, key: Key, brought: list[Batch]) -> tuple[Tensor, Tensor]:
        """The mean and the biased variance of all that the forwards of all ranks bring."""
        meeting = self._meetings.of(_name(key))
        for batch in brought:
            if batch.count:
                meeting.add(batch)
        merge_ranks([meeting], self._group)
        self._meetings.batches = self._gathered.batches
        self._meetings.left_out = self._gathered.left_out
        self._bookmark.save(self._meetings)
        return _as_used(meeting)

    def enough(self) -> bool:
        """Whether the graph too says that each norm, by now final, is called only once."""
        return self._nothing_after and len(self._meetings.accumulators) == len(self._sites)

    def result(self) -> Gathered:
        """What was seen, norm by norm."""
        self._take_passing()
        passed = [
            self._gathered.of(site.path)
            for site, waits in zip(self._sites, self._waits, strict=True)
            if not waits
        ]
        merge_ranks(passed, self._group)
        for name, meeting in self._meetings.accumulators.items():
            total = self._gathered.of(self._sites[_key(name)[0]].path)
            total.merge(meeting.weight, meeting.mean, meeting.spread)
            total.calls += meeting.calls
        for site in self._sites:
            self._gathered.of(site.path)
        return self._gathered

    def _pass(self, site: NormSite, batch: Batch) -> None:
        _require_finite(site, batch, self.lockstep.index)
        self._passing.append((site, batch.precise()))

    def _take_passing(self) -> None:
        for site, batch in self._passing:
            if batch.count:
                self._gathered.of(site.path).add(batch)
        self._passing.clear()

    def _known(self) -> dict[Key, tuple[Tensor, Tensor]]:
        """The answers of the meetings that were settled before, on all ranks."""
        names = list(self._meetings.accumulators)
        common = first_of_all((len(names), 0), self._group) or (0, 0)
        for name in names[common[0] :]:
            del self._meetings.accumulators[name]
        return {_key(n): _as_used(each) for n, each in self._meetings.accumulators.items()}

    def _pooled(self, name: str) -> Accumulator:
        site = self._sites[_key(name)[0]]
        device = site.state.reference().device
        return Pooled(site.num_features, device if device.type != "mps" else torch.device("cpu"))


class _Gate(Probe):
    """Lets a norm wait for its statistics, and compute by them as it does in eval mode."""

    def __init__(self, site: NormSite, place: int, lockstep: Lockstep) -> None:
        super().__init__(site)
        self._place = place
        self._lockstep = lockstep

    def attributes(self) -> dict[str, Any]:
        """Eval mode."""
        return {"training": False}

    def before(self, x: Tensor) -> None:
        """Wait, and let the norm's running statistics be those of all data."""
        try:
            answer = self._lockstep.meet(self._place, partial(self._bring, x))
        except LateArrival:
            raise StatisticsError(
                f"{self.site.label}: batch {self._lockstep.index} reaches it when its statistics "
                "are final, since batches take different ways through the model; use "
                'method="pooled", which needs no waiting'
            ) from None
        for scratch, value in zip(self.scratch, answer, strict=True):
            scratch.copy_(value)

    def _bring(self, x: Tensor) -> Batch:
        channels = self.site.num_features
        if not x.numel():
            nothing = torch.zeros(channels, dtype=torch.float64, device=x.device)
            return Batch(0, 0, nothing, nothing)
        batch = Batch(x.numel() // channels, x.shape[0], *channel_moments(x, self.site.channel_dim))
        _require_finite(self.site, batch, self._lockstep.index)
        return batch


class _NotFinite(StatisticsError):
    """A batch whose values are not finite at some norm."""


def _require_finite(site: NormSite, batch: Batch, index: int) -> None:
    if not bool((batch.mean + batch.var).isfinite().all()):
        raise _NotFinite(
            f"{site.label}: values that are not finite in batch {index} (counted from 0); mend "
            "the data or the model, or leave the batch out of the loader (on_nonfinite="
            '"skip" does it for batches that are so when they reach their first norm)'
        )


def _run(feed: Feed, model: nn.Module, box: list[Any]) -> None:
    """Run a forward on a batch of its own, which nobody else holds or is changed by it."""
    feed.run(model, mapped(box.pop(), Tensor.clone))


def _as_used(meeting: Accumulator) -> tuple[Tensor, Tensor]:
    """Mean and biased variance: what a norm in train mode standardizes by."""
    return meeting.mean, meeting.spread / meeting.weight.clamp(min=1)


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _key(name: str) -> Key:
    place, call = name.split(".")
    return int(place), int(call)
