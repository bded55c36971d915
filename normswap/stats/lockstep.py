"""Many forwards that wait for each other at every norm, on all ranks."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from normswap.errors import StatisticsError
from normswap.stats.distributed import first_of_all
from normswap.stats.shelf import Holder, Shelf
from normswap.stats.strand import Strand, stop

__all__ = ["Arrival", "Bring", "Key", "Lockstep", "Settle", "meet"]

#: A meeting: the number of a norm, and how often one forward has called it before.
Key = tuple[int, int]

#: Makes what a forward, told by its number, brings to a meeting.
Bring = Callable[[int], Any]

#: Makes of what the forwards have brought to a meeting the answer that all of them get.
Settle = Callable[[Key, list[Any]], Any]


@dataclass(frozen=True)
class Arrival:
    """What stops a forward.

    Args:
        place: the number of the norm.
        bring: makes what this forward brings.
        show: makes what tells this forward from one that went wrong on its way.
    """

    place: int
    bring: Bring
    show: Callable[[], Any]


@dataclass(eq=False)
class _Forward:
    strand: Strand
    holder: Holder
    index: int
    calls: Counter[int] = field(default_factory=Counter)
    brought: Any = None


def meet(place: int, bring: Bring, show: Callable[[], Any] = tuple) -> Any:
    """Wait, inside a forward, until the meeting at a norm is settled.

    Args:
        place: the number of the norm.
        bring: makes what this forward brings.
        show: makes what is kept of it, if it is the witness.

    Returns:
        The answer.
    """
    return stop(Arrival(place, bring, show))


class Lockstep:
    """Runs forwards side by side: none goes past a norm before all have reached it.

    Meetings are settled in the order of their keys, the earliest norm of the model first, so
    that forwards which take different ways still meet where their ways join.

    Args:
        shelf: where what waiting forwards hold is kept.
        group: the process group whose ranks meet too; ``None`` for the default one.
        norms: what messages call the norms, by their numbers.
        remedy: what to do where batches take ways that do not meet.
        known: answers that are known from before: nobody waits for these.
        staying: whether forwards stay where they wait; else they end there, to be started anew
            when the meeting is settled.
    """

    def __init__(
        self,
        shelf: Shelf,
        group: Any,
        norms: Sequence[str],
        remedy: str,
        known: Mapping[Key, Any],
        *,
        staying: bool,
    ) -> None:
        self._shelf = shelf
        self._group = group
        self._norms, self._remedy = norms, remedy
        self._answers = dict(known)
        self._staying = staying
        self._company: frozenset[int] = frozenset()
        self._came: dict[Key, frozenset[int]] = {}
        self._waiting: dict[Key, list[_Forward]] = {}
        self._free: deque[tuple[_Forward, Any]] = deque()
        #: the number of the forward that is running or ran last, and the meetings it has come to
        self.index, self.met = -1, 0
        #: the number of a forward of which is kept what it shows, and that by meeting
        self.witness, self.testimony = -1, dict[Key, Any]()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        self.give_up()

    @property
    def waits(self) -> bool:
        """Whether a forward of this rank waits at a meeting."""
        return bool(self._waiting)

    def start(self, run: Callable[[], object], index: int, *, holder: Holder | None = None) -> None:
        """Run a forward up to its first meeting that is not settled, or to its end.

        Args:
            run: the forward.
            index: its number.
            holder: whose is what it makes; ``None`` for nobody else's.

        Raises:
            StatisticsError: it comes late to a meeting.
        """
        holder = holder or self._shelf.holder()
        self._go(_Forward(Strand(holder.making(run)), holder, index))

    def settle(self, settle: Settle) -> bool:
        """Settle the earliest meeting that a forward of any rank waits at.

        Args:
            settle: makes the answer; called on every rank.

        Returns:
            Whether there was one.
        """
        key = first_of_all(min(self._waiting, default=None), self._group)
        if key is None:
            return False
        forwards = self._waiting.pop(key, [])
        self._free.extend((forward, key) for forward in forwards)
        self._answers[key] = settle(key, [forward.brought for forward in forwards])
        came = frozenset(forward.index for forward in forwards)
        self._company = self._company if self._company == came else came
        self._came[key] = self._company
        return True

    def go_on(self, most: int = sys.maxsize) -> None:
        """Run the forwards whose meeting is settled up to their next, or to their end.

        Args:
            most: run only as many.

        Raises:
            StatisticsError: one comes late to a meeting.
        """
        for _ in range(min(most, len(self._free))):
            forward, key = self._free.popleft()
            forward.brought = None
            self._go(forward, self._answers[key])

    def give_up(self) -> None:
        """End every forward that waits."""
        forwards = [forward for forward, _ in self._free]
        forwards += [forward for waiting in self._waiting.values() for forward in waiting]
        self._free.clear()
        self._waiting.clear()
        for forward in forwards:
            # Whatever a forward does about its end, the others are to end too.
            with suppress(Exception):
                forward.strand.give_up()

    def _go(self, forward: _Forward, answer: Any = None) -> None:
        key = self._advance(forward, answer)
        if key is not None:
            self._waiting.setdefault(key, []).append(forward)
            if not self._staying:
                forward.strand.give_up()

    def _advance(self, forward: _Forward, answer: Any) -> Key | None:
        """Run a forward on; return the meeting that it waits at, or at its end ``None``."""
        try:
            with self._shelf.working(forward.holder):
                while True:
                    self.index, self.met = forward.index, forward.calls.total()
                    arrival = forward.strand.advance(answer)
                    if forward.strand.ended:
                        return None
                    key = self._arrive(forward, arrival)
                    if key not in self._answers:
                        return key
                    answer = self._answers[key]
        except BaseException:
            forward.strand.give_up()
            raise

    def _arrive(self, forward: _Forward, arrival: Arrival) -> Key:
        key = (arrival.place, forward.calls[arrival.place])
        forward.calls[arrival.place] += 1
        self.met += 1
        # What a forward brings to its first meeting tells whether its batch is sound; that of one
        # that is not did not come when its batch was read before.
        if self.met == 1 or key not in self._answers:
            forward.brought = arrival.bring(forward.index)
            if forward.index == self.witness:
                self.testimony[key] = arrival.show()
        if forward.index not in self._came.get(key, (forward.index,)):
            raise StatisticsError(
                f"{self._norms[key[0]]}: batch {forward.index} reaches it when its statistics are "
                f"final, since batches take different ways through the model; {self._remedy}"
            )
        return key
