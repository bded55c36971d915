"""The FrozenBatchNorm2d classes of torchvision and of detectron2."""

from __future__ import annotations

from typing import Any

from normswap.norms.registry import add_readers
from normswap.norms.statistics.frozen import read_frozen_batch_norm

__all__ = ["install"]


def install(module: Any) -> None:
    """Teach the registry the class that a library's module defines, if it does."""
    cls = getattr(module, "FrozenBatchNorm2d", None)
    if cls is not None:
        add_readers({cls: read_frozen_batch_norm})
