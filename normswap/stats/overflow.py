"""A file for what memory has no room for; it is gone with the process, however that ends."""

from __future__ import annotations

import ctypes
import tempfile
from bisect import insort

import torch
from torch import UntypedStorage

__all__ = ["Overflow"]


class Overflow:
    """Takes the bytes of storages and gives them back; the space in between is used again.

    The file has no name. It lies where `tempfile` puts files: the environment's ``TMPDIR``.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._end = 0
        self._free: list[tuple[int, int]] = []

    def put(self, storage: UntypedStorage) -> int:
        """Write a storage's bytes and give its memory back.

        Returns:
            Where they are, for `take`.

        Raises:
            OSError: the disk is full; the storage is as before.
        """
        size = storage.nbytes()
        offset = self._reserve(size)
        on_cpu = storage if _here(storage) else _room(size).copy_(storage)
        self._file.seek(offset)
        self._file.write(_bytes(on_cpu))
        storage.resize_(0)
        return offset

    def take(self, storage: UntypedStorage, offset: int, size: int) -> None:
        """Give a storage its memory and its bytes back, and its place in the file to others."""
        storage.resize_(size)
        on_cpu = storage if _here(storage) else _room(size)
        self._file.seek(offset)
        self._file.readinto(_bytes(on_cpu))
        if on_cpu is not storage:
            storage.copy_(on_cpu)
        self.drop(offset, size)

    def drop(self, offset: int, size: int) -> None:
        """Give a place in the file to others."""
        insort(self._free, (offset, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        if merged and sum(merged[-1]) == self._end:
            self._end = merged.pop()[0]
            self._file.truncate(self._end)
        self._free = merged

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _reserve(self, size: int) -> int:
        for index, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[index : index + 1] = (
                    [(start + size, length - size)] if length > size else []
                )
                return start
        self._end += size
        return self._end - size


def _here(storage: UntypedStorage) -> bool:
    return storage.device.type == "cpu"


def _room(size: int) -> UntypedStorage:
    return torch.empty(size, dtype=torch.uint8).untyped_storage()


def _bytes(storage: UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """The very memory of a storage on the CPU."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
