"""Running a function on several CPU processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: What nearly every rank needs, imported once by the process that they are forked from.
_IMPORTED = ["pytest", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "normswap"]

#: A rank that waits longer than this for another has been left alone, and fails.
PATIENCE = timedelta(seconds=60)


def on_ranks(world: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run ``work(rank)`` in ``world`` processes of one group; return what each returned.

    Args:
        world: how many processes.
        work: a function of a module, whose result can be saved by torch.
        folder: an empty folder, where the processes meet.

    Raises:
        ProcessRaisedException: a process raised; the others are ended.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    mp.start_processes(_enter, args=(world, work, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@contextmanager
def lone_rank(folder: Path) -> Iterator[None]:
    """Within the block this process is the only member of a gloo group."""
    with _member(0, 1, folder):
        yield


def _enter(rank: int, world: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    with _member(rank, world, folder):
        result = work(rank)
        dist.barrier()
    torch.save(result, folder / f"{rank}.pt")


@contextmanager
def _member(rank: int, world: int, folder: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
