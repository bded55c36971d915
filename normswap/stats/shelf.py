"""Keeping what stopped forwards hold: in memory up to a budget, in a file past it.

Tensors are put aside by their storage: its bytes go to the file and its memory is given back,
while every tensor and view that lies in it stays the object that it is. So whatever aliases
whatever, in-place operations included, is as before once the bytes are back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode

from normswap.stats.overflow import Overflow

__all__ = ["Shelf"]


@dataclass
class _Held:
    """A storage that somebody's forward made: the tensors in it, and where its bytes are."""

    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    size: int = 0
    offset: int | None = None

    def storage(self) -> UntypedStorage | None:
        """The storage itself, while there is a tensor in it."""
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        for ref in self.tensors:
            tensor = ref()
            if tensor is not None:
                return tensor.untyped_storage()
        return None


class Shelf(TorchFunctionMode):
    """Sees which tensors each owner's functions make, and puts them aside while it waits.

    It is a context: within it, whatever torch function runs is seen.

    Args:
        budget: bytes that waiting owners may hold in memory, all together.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        #: the most bytes that waiting owners held in memory, and those that went to the file
        self.most, self.spilled = 0, 0
        self._overflow: Overflow | None = None
        self._held: dict[Hashable, dict[int, _Held]] = {}
        self._resting: dict[Hashable, int] = {}
        self._away: dict[int, _Held] = {}
        self._current: dict[int, _Held] | None = None

    @contextmanager
    def working(self, owner: Hashable) -> Iterator[None]:
        """Within the block all that an owner holds is in memory, and what is made is its own."""
        held = self._held.setdefault(owner, {})
        self._resting.pop(owner, None)
        for each in held.values():
            self._fetch(each)
        before, self._current = self._current, held
        try:
            yield
        finally:
            self._current = before
            self._rest(owner, held)

    def clear(self) -> None:
        """Forget the owners; what somebody else still holds of theirs is in memory afterwards."""
        for each in list(self._away.values()):
            self._fetch(each)
        self._held.clear()
        self._resting.clear()
        if self._overflow is not None:
            self._overflow.close()
            self._overflow = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function; what it reads is in memory, and what it makes is the owner's."""
        kwargs = kwargs or {}
        if self._away:  # what one forward keeps on the model, another may read
            for key, _ in _stored((args, kwargs)):
                each = self._away.get(key)
                if each is not None:
                    self._fetch(each)
        result = func(*args, **kwargs)
        if self._current is not None:
            self._own(self._current, result, (args, kwargs))
        return result

    def _own(self, held: dict[int, _Held], result: Any, sources: Any) -> None:
        """Note which of a function's results lie in storages of the owner's."""
        for key, tensor in _stored(result):
            each = held.get(key)
            if each is None or each.storage() is None:
                if any(other == key for other, _ in _stored(sources)):
                    continue  # a view of what is not the owner's, such as a weight
                each = held[key] = _Held()
            each.tensors.append(weakref.ref(tensor))

    def _rest(self, owner: Hashable, held: dict[int, _Held]) -> None:
        """Put aside what an owner holds, unless there is room for it in memory."""
        storages = {key: each.storage() for key, each in held.items()}
        for key in [key for key, storage in storages.items() if storage is None]:
            del held[key], storages[key]
        size = sum(storage.nbytes() for storage in storages.values() if storage is not None)
        resting = sum(self._resting.values())
        if resting + size <= self.budget:
            self._resting[owner] = size
            self.most = max(self.most, resting + size)
            return
        self._overflow = self._overflow or Overflow()
        for key, storage in storages.items():
            if storage is not None and storage.nbytes() and storage.resizable():
                each = held[key]
                each.size = storage.nbytes()
                each.offset = self._overflow.put(storage)
                self._away[key] = each
                self.spilled += each.size

    def _fetch(self, each: _Held) -> None:
        """Bring a storage's bytes back into memory, if they are away and somebody wants them."""
        if each.offset is None or self._overflow is None:
            return
        offset, each.offset = each.offset, None
        storage = each.storage()
        if storage is None:
            self._overflow.drop(offset, each.size)
            self._away = {key: other for key, other in self._away.items() if other is not each}
        else:
            self._overflow.take(storage, offset, each.size)
            self._away.pop(storage._cdata, None)


def _stored(value: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors in what a function takes or returns, each with what tells its storage."""
    for tensor in _tensors(value):
        # Some kinds, as those within vmap, only stand for others that have a storage.
        with suppress(NotImplementedError, RuntimeError):
            yield tensor.untyped_storage()._cdata, tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
