"""Leaving a model as it was: modes and running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.modules import find
from normswap.graph.site import NormSite
from normswap.norms.functional import FunctionalNorm, owner_of, referred

__all__ = ["kept_attributes", "kept_modes", "kept_settings", "preserve_stats"]


_ATTENTION = ("flash", "mem_efficient", "math")


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
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """On leaving, every module has the attributes, and every tensor in it the data, as before.

    What forwards set for a while and put back when they end, such as a flag or a weight, is not
    put back by those that are ended on their way, and in the wrong order by those that take turns.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    held = (*model.parameters(), *model.buffers())
    tensors = [(each, each.data) for each in held if type(each) in (Tensor, nn.Parameter)]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for tensor, data in tensors:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data


@contextmanager
def kept_settings() -> Iterator[None]:
    """On leaving, what torch and Python hold for the process is as before.

    That is the default precision, the ways to compute attention, and the filters of warnings: what
    a forward may set for a while, as with `kept_attributes`.
    """
    dtype = torch.get_default_dtype()
    cuda: Any = torch.backends.cuda
    ways = {
        way: getattr(cuda, f"{way}_sdp_enabled")() for way in ("flash", "mem_efficient", "math")
    }
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for way, enabled in ways.items():
            getattr(cuda, f"enable_{way}_sdp")(enabled)


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
        (held, name, buffer, buffer.detach().clone())
        for site in find(model)
        for held, name in _buffers_of(site)
        if (buffer := held[name]) is not None
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


def _buffers_of(site: NormSite) -> Iterator[tuple[dict[str, Tensor | None], str]]:
    """Where a site's buffers are: in its module, or for a call in the forward's owner."""
    module = site.module
    owner = site.owner or owner_of(module)
    refers = module.refers if isinstance(module, FunctionalNorm) else referred(module)
    if owner is not None:
        yield from ((owner._buffers, name) for name in refers.values() if name in owner._buffers)
    yield from ((module._buffers, name) for name in module._buffers)
