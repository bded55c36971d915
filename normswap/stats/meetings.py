"""The statistics that forwards found together at norms: one set for every call in a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.graph.site import NormSite
from normswap.stats.accumulate import Accumulator, Batch, Pooled
from normswap.stats.bookmark import Bookmark
from normswap.stats.distributed import first_of_all, merge_ranks
from normswap.stats.gathered import Gathered
from normswap.stats.lockstep import Key

__all__ = ["Answer", "Meetings"]

#: Mean and biased variance, (C,) each: what a norm in train mode standardizes by.
Answer = tuple[Tensor, Tensor]


class Meetings:
    """What is known of the norms, meeting by meeting.

    Args:
        sites: the norms.
        bookmark: where it is kept, and was kept by a pass that ended on its way.
        group: the process group, whose ranks meet.
    """

    def __init__(self, sites: list[NormSite], bookmark: Bookmark, group: Any) -> None:
        self._sites = sites
        self._bookmark = bookmark
        self._group = group
        self._store = Gathered(self._pooled)
        bookmark.load(self._store)
        # One rank may have got further than another before they ended.
        names = list(self._store.accumulators)
        common, _ = first_of_all((len(names), 0), group) or (0, 0)
        for name in names[common:]:
            del self._store.accumulators[name]

    def answers(self) -> dict[Key, Answer]:
        """The statistics of all meetings that are settled."""
        return {_key(name): _answer(each) for name, each in self._store.accumulators.items()}

    def settle(self, key: Key, brought: list[Batch]) -> Answer:
        """The statistics of all that the forwards of all ranks bring to a meeting."""
        meeting = self._store.of(f"{key[0]}.{key[1]}")
        for batch in brought:
            if batch.count:
                meeting.add(batch)
        merge_ranks([meeting], self._group)
        self._bookmark.save(self._store)
        return _answer(meeting)

    def add_to(self, gathered: Gathered) -> None:
        """Tell what each norm has seen, in all meetings at it."""
        for name, meeting in self._store.accumulators.items():
            total = gathered.of(self._sites[_key(name)[0]].path)
            total.merge(meeting.weight, meeting.mean, meeting.spread)
            total.calls += meeting.calls

    def _pooled(self, name: str) -> Accumulator:
        site = self._sites[_key(name)[0]]
        device = site.state.reference().device
        return Pooled(site.num_features, device if device.type != "mps" else torch.device("cpu"))


def _answer(meeting: Accumulator) -> Answer:
    return meeting.mean, meeting.spread / meeting.weight.clamp(min=1)


def _key(name: str) -> Key:
    place, call = name.split(".")
    return int(place), int(call)
