"""What a pass may leave behind outside of the model: stopped functions, open files, modes."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch.overrides import _len_torch_function_stack

__all__ = ["files_made", "greenlets_made", "thread_modes"]


@contextmanager
def greenlets_made() -> Iterator[Callable[[], list[greenlet]]]:
    """Yield a function that tells the greenlets that begun within the block and have not ended."""
    gc.freeze()
    try:
        yield _stopped
    finally:
        gc.unfreeze()


def thread_modes() -> list[Any]:
    """The modes of torch that hold for this thread."""
    kinds = ("cpu", "cuda")
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        torch.is_autocast_cache_enabled(),
        _len_torch_function_stack(),
    ]


@contextmanager
def files_made() -> Iterator[list[Any]]:
    """The temporary files that are made within the block."""
    files: list[Any] = []
    make = tempfile.TemporaryFile

    def noted(*args: Any, **options: Any) -> Any:
        files.append(make(*args, **options))
        return files[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", noted)
        yield files


def _stopped() -> list[greenlet]:
    gc.collect()
    made = [each for each in gc.get_objects() if issubclass(type(each), greenlet)]
    return [each for each in made if each and each is not getcurrent()]
