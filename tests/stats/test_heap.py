"""Memory that is let go of goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from normswap.stats.heap import SLACK, Heap
from tests.reference.forks import in_process_of_its_own

STATM = Path("/proc/self/statm")
#: Blocks, and values of one: 400 KiB each, 100 MiB in all, of which one in 32 stays, the last too.
BLOCKS, VALUES, STAYS = 256, 100 * 2**10, 32
MEGABYTE = 2**20

pytestmark = pytest.mark.skipif(
    not (STATM.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="there is no C library that keeps it and can be asked",
)


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown() -> tuple[int, int, int]:
    """By how much the process has grown when all is held, let go of, and asked for."""
    torch.ones(64 * VALUES)  # once one was let go of, the library keeps all that are not larger
    ctypes.CDLL(None).malloc_trim(0)  # what is free by now is not to be counted
    before, heap = resident(), Heap(0)
    blocks = [torch.ones(VALUES) for _ in range(BLOCKS)]
    held = resident() - before
    stay = blocks[STAYS - 1 :: STAYS]
    del blocks
    let_go = resident() - before
    heap.look(SLACK)
    asked = resident() - before
    assert len(stay) == BLOCKS // STAYS
    return held, let_go, asked


def test_what_lies_between_things_that_stay_is_given_back() -> None:
    held, let_go, asked = in_process_of_its_own(grown)
    assert held > 90 * MEGABYTE
    assert let_go > 90 * MEGABYTE  # else there is nothing to be done
    assert asked < 10 * MEGABYTE
