"""A file for what memory has no room for; it is gone with the process, however that ends."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from bisect import bisect
from collections.abc import Callable
from functools import cached_property
from typing import IO

import torch
from torch import UntypedStorage

__all__ = ["Overflow"]

#: After as many bytes the C library is told to return to the system what is free. Left alone, glibc
#: keeps blocks of up to 32 MB, and aligned ones, as torch's are, it seldom uses again: a process
#: that put 320 MB into the file grew by 300.
TRIM_EVERY = 1 << 24


class Overflow:
    """Takes the bytes of storages and gives them back; the space in between is used again.

    The file has no name. It lies where `tempfile` puts files: the environment's ``TMPDIR``.
    """

    def __init__(self) -> None:
        self._end = 0
        self._free: list[tuple[int, int]] = []
        self._untrimmed = 0

    @cached_property
    def _file(self) -> IO[bytes]:
        # Without a buffer: a write that the disk has no room for fails at once, not later.
        return tempfile.TemporaryFile(buffering=0)

    @cached_property
    def _trim(self) -> Callable[[int], object]:
        if sys.platform != "linux":
            return lambda pad: None
        # Other C libraries than glibc do not have it, and return memory by themselves.
        trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        return trim

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
        rest = _bytes(on_cpu)
        self._file.seek(offset)
        while rest:
            rest = rest[self._file.write(rest) :]
        storage.resize_(0)
        self._untrimmed += size
        if self._untrimmed >= TRIM_EVERY:
            self._trim(0)
            self._untrimmed = 0
        return offset

    def take(self, storage: UntypedStorage, offset: int, size: int) -> None:
        """Give a storage its memory and its bytes back, and its place in the file to others.

        Raises:
            OSError: the file cannot be read.
        """
        storage.resize_(size)
        on_cpu = storage if _here(storage) else _room(size)
        rest = _bytes(on_cpu)
        self._file.seek(offset)
        while rest:
            read = self._file.readinto(rest)  # type: ignore[attr-defined]
            if not read:
                raise OSError("the file of what had no room in memory has been cut off")
            rest = rest[read:]
        if on_cpu is not storage:
            storage.copy_(on_cpu)
        self.drop(offset, size)

    def drop(self, offset: int, size: int) -> None:
        """Give a place in the file to others."""
        place = bisect(self._free, (offset, size))
        end = offset + size
        if place < len(self._free) and self._free[place][0] == end:
            end += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            place -= 1
            offset = self._free.pop(place)[0]
        self._free.insert(place, (offset, end - offset))

    def close(self) -> None:
        """Delete the file."""
        if "_file" in vars(self):
            self._file.close()
            del self._file
        self._end, self._free = 0, []

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


def _bytes(storage: UntypedStorage) -> memoryview:
    """The very memory of a storage on the CPU."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
