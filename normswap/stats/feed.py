"""Feeding a loader to a model: what of a batch the forward takes, where it goes, when to stop."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError

__all__ = ["Forward", "batch_size", "batches_of", "call", "moved", "unwrapped"]

Forward = Callable[[nn.Module, Any], Any]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper or a compiled one, whose forwards do more."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if inner is None:
            return model
        model = inner


def call(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the model on a batch.

    A tensor is passed as it is; of a tuple or list the first item; a mapping as those keywords
    that the forward accepts; ``forward(model, batch)`` does anything else.
    """
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**_accepted(model, batch))
    elif isinstance(batch, (tuple, list)):
        model(batch[0])
    else:
        model(batch)


def _accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(batch)
    accepted = {name: value for name, value in batch.items() if name in parameters}
    if not accepted:
        raise OptionError(
            f"the forward of {type(model).__name__} takes none of the batch's keys "
            f"{sorted(batch)}; give forward=f(model, batch)"
        )
    return accepted


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device, whatever they are nested in."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def batch_size(batch: Any) -> int:
    """How many samples a batch has: the first dimension of the first tensor in it; 1 without."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, (tuple, list)) or isinstance(batch, Mapping):
        for value in values:
            if isinstance(value, (Tensor, tuple, list, Mapping)):
                return batch_size(value)
    return 1


def batches_of(
    loader: Iterable[Any], *, batches: int | None, samples: int | None, progress: bool, title: str
) -> Iterator[Any]:
    """Read a loader up to a budget, with a progress bar where a terminal shows it.

    Args:
        loader: any iterable of batches.
        batches: read at most as many.
        samples: stop after the batch that reaches as many.
        progress: whether to show a bar.
        title: what the bar is called.

    Raises:
        OptionError: a budget under one.
    """
    for name, budget in (("batches", batches), ("samples", samples)):
        if budget is not None and budget < 1:
            raise OptionError(f"{name}={budget} leaves nothing to read; give 1 or more, or None")
    seen = 0
    for index, batch in enumerate(_tracked(loader, batches, progress, title), start=1):
        yield batch
        seen += batch_size(batch)
        if (batches is not None and index >= batches) or (samples is not None and seen >= samples):
            return


def _tracked(
    loader: Iterable[Any], batches: int | None, progress: bool, title: str
) -> Iterator[Any]:
    if not (progress and sys.stderr.isatty()):
        yield from loader
        return
    from rich.console import Console
    from rich.progress import track

    try:
        total: int | None = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if batches is not None:
        total = batches if total is None else min(batches, total)
    yield from track(loader, title, total=total, console=Console(stderr=True), transient=True)
