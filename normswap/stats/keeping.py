"""Leaving a model as it was: modes, random states, running statistics."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from normswap.graph.modules import find

__all__ = ["kept_modes", "kept_random_state", "preserve_stats"]


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """On leaving, every module's ``training`` flag is as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def kept_random_state() -> Iterator[None]:
    """On leaving, the generators of torch, Python and (if it is loaded) NumPy are as before."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if in_use else ()):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def preserve_stats(model: nn.Module) -> Iterator[nn.Module]:
    """Keep running statistics: on leaving, also by an exception, they are as they were.

    Whatever a forward in train mode, a `normswap.warmup` or a test-time adaptation did inside
    the block to the buffers of the model's norms is undone in place.

    Args:
        model: any module.

    Yields:
        The model.
    """
    kept = [
        (buffer, buffer.detach().clone())
        for site in find(model)
        for buffer in site.module.buffers()
    ]
    try:
        yield model
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
