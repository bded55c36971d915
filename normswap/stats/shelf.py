"""Keeping what stopped forwards hold: in memory up to a budget, in a file past it.

Tensors are put aside by their storage: its bytes go to the file and its memory is given back,
while every tensor and view that lies in it stays the object that it is. So whatever aliases
whatever, in-place operations included, is as before once the bytes are back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import UntypedStorage, nn

from normswap.stats.heap import Heap
from normswap.stats.overflow import Overflow
from normswap.stats.watch import Watch, kept_on

__all__ = ["Holder", "Shelf"]


@dataclass(eq=False)
class Holder:
    """Somebody who makes tensors, and waits now and then.

    Args:
        watch: the context to make them in.
        resting: bytes of them that are in memory while they wait.
    """

    watch: Watch
    resting: int = 0

    def making(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same function, for itself: what it makes is theirs."""
        return partial(_within, self.watch, run)


@dataclass(frozen=True)
class _Away:
    """Whose storage it is, and where its bytes are."""

    holder: Holder
    offset: int
    size: int


class Shelf:
    """Holds what others made while they wait.

    Args:
        budget: bytes that those who wait may hold in memory, all together.
        models: what they keep on these stays in memory.
    """

    def __init__(self, budget: int, *models: nn.Module) -> None:
        self.budget = budget
        self._models = models
        #: bytes that those who wait hold in memory; the most that this ever was; and the bytes
        #: that went to the file
        self.resting, self.most, self.spilled = 0, 0, 0
        self._overflow = Overflow()
        self._heap = Heap(budget)
        self._away: dict[int, _Away] = {}
        #: what those who work have read of those who wait
        self._lent: dict[int, _Away] = {}

    def holder(self) -> Holder:
        """Somebody new."""
        return Holder(Watch(self._away, self._lend))

    @contextmanager
    def working(self, holder: Holder) -> Iterator[None]:
        """Within the block all that somebody made is in memory; afterwards they wait."""
        for key in holder.watch.made():
            if key in self._away:
                self._fetch(key)
        self._keep(holder, -holder.resting)
        try:
            yield
        finally:
            self._rest(holder)

    def clear(self) -> None:
        """Have all that is still wanted in memory, and be empty."""
        for key in list(self._away):
            self._fetch(key)
        self._lent.clear()
        self.resting = 0
        self._overflow.close()

    def _rest(self, holder: Holder) -> None:
        """Put aside what somebody made or has read, as far as there is no room for it in memory."""
        while self._lent:
            key, lent = self._lent.popitem()
            self._keep(lent.holder, -lent.size)
            storage = lent.holder.watch.storage(key)
            if storage is not None:
                self._put(lent.holder, key, storage)
        seen = 0
        kept: set[int] | None = None
        for key, storage in holder.watch.storages():
            size = storage.nbytes()
            seen += size
            if kept is None and self._lacks_room(size):
                kept = set[int]().union(*map(kept_on, self._models))
            if kept is None or key not in kept:
                self._put(holder, key, storage)
        self.most = max(self.most, self.resting)
        self._heap.look(seen)

    def _put(self, holder: Holder, key: int, storage: UntypedStorage) -> None:
        size = storage.nbytes()
        if self._lacks_room(size) and size and storage.resizable():
            self._away[key] = _Away(holder, self._overflow.put(storage), size)
            self.spilled += size
        else:
            self._keep(holder, size)

    def _lacks_room(self, size: int) -> bool:
        return self.resting + size > self.budget

    def _keep(self, holder: Holder, size: int) -> None:
        holder.resting += size
        self.resting += size

    def _lend(self, key: int) -> None:
        """Bring a storage back into memory for somebody who is about to read it."""
        self._lent[key] = self._away[key]
        self._fetch(key)

    def _fetch(self, key: int) -> None:
        """Bring a storage's bytes back into memory, if there is a tensor in it still."""
        away = self._away[key]
        storage = away.holder.watch.storage(key)
        if storage is None:
            self._overflow.drop(away.offset, away.size)
        else:
            self._overflow.take(storage, away.offset, away.size)
            self._keep(away.holder, away.size)
        del self._away[key]


def _within(watch: Watch, run: Callable[[], object]) -> object:
    with watch:
        return run()
