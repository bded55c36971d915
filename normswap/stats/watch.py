"""Seeing which storages a stretch of code makes, and which tensors it is about to read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

__all__ = ["Watch", "kept_on"]

#: Who has what these return reads a tensor's memory without torch: it has to stay where it is.
_HANDS_OUT = (Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage)


class Watch(TorchFunctionMode):
    """A context that knows what was made in it, as far as torch functions of Python made it.

    Args:
        away: the storages, by key, that are not in memory.
        fetch: brings one back, before a function reads it.
    """

    def __init__(self, away: Container[int], fetch: Callable[[int], None]) -> None:
        super().__init__()
        self._away = away
        self._fetch = fetch
        self._made: dict[int, StorageWeakRef] = {}

    def made(self) -> list[int]:
        """What tells the storages apart that were made."""
        return list(self._made)

    def storage(self, key: int) -> UntypedStorage | None:
        """A storage that was made, while there is a tensor in it."""
        storage: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(self._made[key].cdata)
        return storage

    def storages(self) -> Iterator[tuple[int, UntypedStorage]]:
        """Those in which there are tensors still; the others are forgotten."""
        for key in self.made():
            storage = self.storage(key)
            if storage is None:
                del self._made[key]
            else:
                yield key, storage

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function."""
        given = (args, kwargs) if kwargs else args
        if self._away:
            for storage in _storages(given):
                if storage._cdata in self._away:
                    self._fetch(storage._cdata)
        if func in _HANDS_OUT:
            self._made.pop(args[0].untyped_storage()._cdata, None)
        result = func(*args, **(kwargs or {}))
        returned = _storages((result,))
        new = [each for each in returned if each._cdata not in self._made] if returned else ()
        if new:  # or a view of what was there before, such as a weight
            read = {storage._cdata for storage in _storages(given)}
            made = (s for s in new if s._cdata not in read)
            self._made.update((s._cdata, StorageWeakRef(s)) for s in made)  # type: ignore[no-untyped-call]
        return result


def kept_on(model: nn.Module) -> set[int]:
    """The keys of the storages that a model holds as attributes: what others may read any time.

    Compiled code reads them without torch's functions of Python.
    """
    own = vars(nn.Module()).keys()
    return {
        storage._cdata
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, tuple, list, dict)) and name not in own
        for storage in _storages((value,))
    }


def _storages(values: Iterable[Any]) -> list[UntypedStorage]:
    """The storages of the plain tensors in what a function takes or returns."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            try:
                found.append(value.untyped_storage())
            except (NotImplementedError, RuntimeError):
                continue  # some kinds have none, and some, as those within vmap, stand for others
        elif isinstance(value, (tuple, list)):
            found += _storages(value)
        elif isinstance(value, dict):
            found += _storages(value.values())
    return found
