"""Running functions in processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["Killed", "in_fork", "in_process_of_its_own", "kill_oneself"]

#: Seconds after which a fork that has not ended is taken for stuck.
PATIENCE = 120

_THREADS = Path("/proc/self/task")


class Killed(Exception):
    """The process was killed as ``kill -9`` does, and returned nothing."""


def in_process_of_its_own(work: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a fresh process of a single thread, which may fork.

    Of a process with several threads, such as those that OpenMP and OpenBLAS keep, only one is in
    its fork, where what the others held locked is never unlocked.

    Raises:
        BrokenProcessPool: the process died.
    """
    with pytest.MonkeyPatch.context() as patch:
        for library in ("OMP", "OPENBLAS", "MKL"):
            patch.setenv(f"{library}_NUM_THREADS", "1")
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, fresh, torch.set_num_threads, (1,)) as pool:
            return pool.submit(work, *args).result()


def in_fork(work: Callable[[], Any]) -> Any:
    """Call a function in a fork of this process, which has a single thread.

    Returns:
        What it returns, which `pickle` has to know.

    Raises:
        Killed: it was killed.
        AssertionError: it raised, or ended by another signal; the message tells.
    """
    if _THREADS.exists():
        assert len(os.listdir(_THREADS)) == 1, "a process that has threads must not be forked"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        os.close(reader)
        try:
            told = pickle.dumps((True, work()))
        except BaseException:
            told = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(told)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL:
            raise Killed
        raise AssertionError(f"the fork ended by {signal.Signals(os.WTERMSIG(status)).name}")
    succeeded, result = pickle.loads(sent)
    assert succeeded, result
    return result


def kill_oneself() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)
