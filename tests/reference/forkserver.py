"""Fresh processes of a single thread, which do not have to import everything again."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

__all__ = ["forkserver"]

#: What nearly every process needs, imported once by the one that they are forked from.
_IMPORTED = ["pytest", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "normswap"]


def forkserver() -> ForkServerContext:
    """The context to start such processes in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
