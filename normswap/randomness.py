"""Leaving random generators as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["kept_random_state", "torch_states"]


@contextmanager
def kept_random_state() -> Iterator[None]:
    """On leaving, the generators of torch, Python and (if it is loaded) NumPy are as before."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if _on_cuda() else ()):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def torch_states() -> list[Tensor]:
    """The states of torch's generators that are in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _on_cuda() else ())]


def _on_cuda() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized
