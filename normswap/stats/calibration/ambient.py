"""The modes of torch that belong to a thread, kept over what takes turns in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

__all__ = ["kept_ambient"]

_KINDS = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def kept_ambient() -> Iterator[None]:
    """Inference mode, gradient mode and autocast are after the block what they are before it.

    Two forwards that take turns in one thread each enter and leave such modes, and not in the
    order of a stack. So both sides keep their own over every change of turn.
    """
    grad = torch.is_grad_enabled()
    with ExitStack() as modes:
        # The mode that there is, again: its exit brings back all that it changes.
        modes.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
        modes.enter_context(torch.set_grad_enabled(grad))
        for kind in _KINDS:
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            modes.callback(partial(torch.set_autocast_enabled, kind, enabled))
            modes.callback(partial(torch.set_autocast_dtype, kind, dtype))
        yield
