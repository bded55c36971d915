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
from normswap.stats.own_terms import as_kept, width

__all__ = ["Answer", "Meetings"]

#: Mean and variance, (C,) each: what a norm in train mode standardizes by.
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

    def __len__(self) -> int:
        return len(self._store.accumulators)

    def answers(self) -> dict[Key, Answer]:
        """The statistics of all meetings that are settled."""
        return {_key(name): self._answer(_key(name)) for name in self._store.accumulators}

    def settle(self, key: Key, brought: list[Batch]) -> Answer:
        """The statistics of all that the forwards of all ranks bring to a meeting."""
        meeting = self._store.of(_name(key))
        meeting.add_all([batch for batch in brought if batch.count])
        merge_ranks([meeting], self._group)
        self._bookmark.save(self._store)
        return self._answer(key)

    def add_to(self, gathered: Gathered) -> None:
        """Tell what each norm has seen, in all meetings at it."""
        totals: dict[int, Accumulator] = {}
        for name, meeting in self._store.accumulators.items():
            total = totals.setdefault(_key(name)[0], self._pooled(name))
            total.merge(meeting.weight, meeting.mean, meeting.spread)
            total.calls += meeting.calls
        for place, total in totals.items():
            site, weight = self._sites[place], total.weight
            seen = gathered.of(site.path)
            seen.merge(weight, *as_kept(site, weight, total.mean, total.spread))
            seen.calls += total.calls

    def _answer(self, key: Key) -> Answer:
        """In the precision that the norm computes in: once here, not once in every forward."""
        meeting, site = self._store.of(_name(key)), self._sites[key[0]]
        like = site.state.reference()
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, spread = meeting.mean[: site.num_features], meeting.spread[: site.num_features]
        var = spread / meeting.weight.clamp(min=1)
        return mean.to(like.device, dtype), var.to(like.device, dtype)

    def _pooled(self, name: str) -> Pooled:
        site = self._sites[_key(name)[0]]
        device = site.state.reference().device
        return Pooled(width(site), device if device.type != "mps" else torch.device("cpu"))


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _key(name: str) -> Key:
    place, call = name.split(".")
    return int(place), int(call)
