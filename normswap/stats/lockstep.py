"""Many forwards that wait for each other at every norm, on all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from normswap.errors import StatisticsError
from normswap.stats.distributed import first_of_all
from normswap.stats.shelf import Shelf
from normswap.stats.strand import Strand, stop

__all__ = ["Key", "Lockstep", "Settle"]

#: A meeting: the number of a norm, and how often one forward has called it before.
Key = tuple[int, int]

#: Makes of what the forwards have brought to a meeting the answer that all of them get.
Settle = Callable[[Key, list[Any]], Any]


@dataclass(eq=False)
class _Forward:
    strand: Strand
    index: int
    calls: Counter[int] = field(default_factory=Counter)
    brought: Any = None


class Lockstep:
    """Runs forwards side by side: none goes past a norm before all have reached it.

    Meetings are settled in the order of their keys, the earliest norm of the model first, so
    that forwards which take different ways still meet where their ways join.

    Args:
        shelf: where what waiting forwards hold is kept.
        group: the process group whose ranks meet too; ``None`` for the default one.
        known: answers that are known from before: nobody waits for these.
    """

    def __init__(self, shelf: Shelf, group: Any, known: Mapping[Key, Any]) -> None:
        self._shelf = shelf
        self._group = group
        self._known = known
        self._settled: set[Key] = set()
        self._waiting: dict[Key, list[_Forward]] = {}
        self._running: _Forward | None = None

    @property
    def index(self) -> int:
        """The number of the forward that is running."""
        return self._forward.index

    @property
    def _forward(self) -> _Forward:
        if self._running is None:
            raise StatisticsError("a norm was called outside of the forward that was to be run")
        return self._running

    def start(self, run: Callable[[], object], index: int) -> None:
        """Run a forward up to its first meeting, or to its end if it has none."""
        self._advance(_Forward(Strand(run), index))

    def meet(self, place: int, bring: Callable[[], Any]) -> Any:
        """Wait, inside a forward, until the meeting at a norm is settled.

        Args:
            place: the number of the norm.
            bring: makes what this forward brings to the meeting.

        Returns:
            The answer.

        Raises:
            StatisticsError: the meeting is over.
        """
        forward = self._forward
        key = (place, forward.calls[place])
        forward.calls[place] += 1
        if key in self._known:
            return self._known[key]
        if key in self._settled:
            raise LateArrival(place)
        forward.brought = bring()
        return stop(key)

    def run(self, settle: Settle, *, enough: Callable[[], bool]) -> None:
        """Settle meeting after meeting until every forward has ended.

        Args:
            settle: makes the answers; called on every rank for every meeting of any.
            enough: asked when a forward has ended whether the others, which wait where it did,
                have nothing more to bring either.
        """
        while (key := first_of_all(min(self._waiting, default=None), self._group)) is not None:
            forwards = self._waiting.pop(key, [])
            answer = settle(key, [forward.brought for forward in forwards])
            self._settled.add(key)
            while forwards:
                forward = forwards.pop(0)
                forward.brought = None
                self._advance(forward, answer)
                if forward.strand.ended and enough():
                    _give_up(forwards)

    def give_up(self) -> None:
        """End every forward that still waits."""
        waiting, self._waiting = self._waiting, {}
        for forwards in waiting.values():
            _give_up(forwards)

    def _advance(self, forward: _Forward, answer: Any = None) -> None:
        self._running = forward
        try:
            with self._shelf.working(forward.index):
                key = forward.strand.advance(answer)
        finally:
            self._running = None
        if not forward.strand.ended:
            self._waiting.setdefault(key, []).append(forward)


def _give_up(forwards: list[_Forward]) -> None:
    while forwards:
        # Whatever a forward does about its end, the others are to end too.
        with suppress(Exception):
            forwards.pop().strand.give_up()


class LateArrival(StatisticsError):
    """A forward reached a norm whose statistics were final already.

    Args:
        place: the number of the norm.
    """

    def __init__(self, place: int) -> None:
        super().__init__(f"norm {place} was reached again")
        self.place = place
