"""Leaving a model as it was: modes and running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from normswap.graph.modules import find

__all__ = ["kept_modes", "preserve_stats"]


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
        (site.module._buffers, name, buffer, buffer.detach().clone())
        for site in find(model)
        for name, buffer in site.module._buffers.items()
        if buffer is not None
    ]
    try:
        yield model
    finally:
        with torch.no_grad():
            for held, name, buffer, value in kept:
                # A move to another device or precision puts other tensors in their place.
                now = held.get(name)
                (buffer if now is None else now).copy_(value)
                if now is None:
                    held[name] = buffer
