"""Running functions in processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Killed", "in_fork", "in_process_of_its_own", "kill_oneself"]


class Killed(Exception):
    """The process was killed, and returned nothing."""


def in_process_of_its_own(work: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a fresh process, which may fork: it never had two threads."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(work, args)


def in_fork(work: Callable[[], Any]) -> Any:
    """Call a function in a fork of this process.

    Returns:
        What it returns, which `pickle` has to know.

    Raises:
        Killed: it was killed.
        AssertionError: it raised; the message is the traceback.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            told = True, work()
        except BaseException:
            told = False, traceback.format_exc()
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(told, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Killed
    succeeded, result = pickle.loads(sent)
    assert succeeded, result
    return result


def kill_oneself() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)
