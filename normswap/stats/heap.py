"""Having the C library give back to the system the memory that nobody holds any more.

What is freed between things that stay, malloc keeps for itself: where many large tensors come and
go beside small ones that wait, that soon is more than all that is held.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["Heap"]

_STATM = Path("/proc/self/statm")
#: Less than this beyond what is allowed is not worth a look for what could be given back.
SLACK = 2**23


class Heap:
    """Watches what the process holds, and has what is free given back when that grows too large.

    Only glibc keeps as much, and only it can be asked: elsewhere nothing is done.

    Args:
        allowed: bytes that may come on top of what is held now.
    """

    def __init__(self, allowed: int) -> None:
        self._trim = _malloc_trim()
        self._limit = self._resident() + allowed + SLACK
        self._passed = 0

    def look(self, size: int) -> None:
        """Have memory given back if there is too much of it.

        Args:
            size: bytes of memory that were held or let go since.
        """
        self._passed += size
        if self._trim is None or self._passed < SLACK:
            return
        self._passed = 0
        if self._resident() > self._limit:
            self._trim(0)
            # What is held for good, asking for it again would not give back.
            self._limit = max(self._limit, self._resident() + SLACK)

    def _resident(self) -> int:
        if self._trim is None:
            return 0
        with open(_STATM, "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[int], int] | None:
    if not _STATM.exists():
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
