"""Feeding a loader to a model: what of a batch the forward takes, where it goes, when to stop."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import UserDict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.progress import bar

__all__ = [
    "Feed",
    "Forward",
    "batch_size",
    "batches_of",
    "call",
    "device_of",
    "mapped",
    "moved",
    "uncompiled",
    "unwrapped",
]

Forward = Callable[[nn.Module, Any], Any]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
#: The kinds of the parameters (*args, **kwargs).
_ANYTHING = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@dataclass(frozen=True)
class Feed:
    """How a pass reads a loader and hands its batches to a model.

    Args:
        loader: any iterable of batches.
        batches: read at most as many.
        samples: stop after the batch that reaches as many.
        forward: ``forward(model, batch)`` for models that are called otherwise.
        device: where batches are moved.
        amp: run under autocast: a dtype, or true for the device's default.
        progress: whether to show a bar.
        title: what the bar is called.
    """

    loader: Iterable[Any]
    batches: int | None
    samples: int | None
    forward: Forward | None
    device: torch.device
    amp: torch.dtype | bool | None
    progress: bool
    title: str

    def __iter__(self) -> Generator[Any, None, None]:
        """Read the loader."""
        return batches_of(
            self.loader,
            batches=self.batches,
            samples=self.samples,
            progress=self.progress,
            title=self.title,
        )

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch; return what it returns."""
        with self._autocast():
            return call(model, moved(batch, self.device), self.forward)

    def _autocast(self) -> Any:
        if self.amp is None or self.amp is False:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=None if self.amp is True else self.amp)


def device_of(model: nn.Module, wanted: torch.device | str | None) -> torch.device:
    """The device that is wanted, or else that of the model's first tensor."""
    if wanted is not None:
        return torch.device(wanted)
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper or a compiled one, whose forwards do more."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if inner is None:
            return model
        model = inner


def uncompiled() -> AbstractContextManager[Any]:
    """A context within which the compiled parts of models run as they were written."""
    # Only what torch has loaded can have compiled something; stances came with torch 2.6.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def call(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run the model on a batch.

    A tensor is passed as it is; of a tuple or list the first item; a mapping as those keywords
    that the forward accepts; ``forward(model, batch)`` does anything else.
    """
    if forward is not None:
        return forward(model, batch)
    args, kwargs = forward_arguments(model, batch)
    return model(*args, **kwargs)


def forward_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch the forward takes, by position and by keyword."""
    if isinstance(batch, Mapping):
        return (), _accepted(model, batch)
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


def _accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(model)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(batch)
    accepted = {name: value for name, value in batch.items() if name in parameters}
    if not accepted:
        raise OptionError(
            f"the forward of {type(model).__name__} takes none of the batch's keys "
            f"{sorted(batch)}; give forward=f(model, batch)"
        )
    return accepted


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model's forward takes: that of the model inside, where it hands on whatever comes."""
    while True:
        parameters = inspect.signature(model.forward).parameters
        inner = model._modules.get("module")
        if inner is None or {each.kind for each in parameters.values()} != _ANYTHING:
            return parameters
        # As averaged copies of a model do: torch's AveragedModel, timm's ModelEmaV3.
        model = unwrapped(inner)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device, whatever they are nested in."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with its tensors changed, whatever they are nested in."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _rebuilt(value, {key: mapped(part, change) for key, part in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    return value


def _rebuilt(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same type with other items; a plain one where that cannot be made.

    Only of these two is it certain that a shallow copy has items of its own.
    """
    if type(value) is dict or not isinstance(value, (dict, UserDict)):
        return items
    try:
        rebuilt: Any = copy.copy(value)
        for key, item in items.items():
            rebuilt[key] = item
    except (TypeError, NotImplementedError):  # it is read-only, or made of something else
        return items
    return cast("Mapping[Any, Any]", rebuilt)


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
) -> Generator[Any, None, None]:
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
    length = _least(batches, _length(loader))
    seen = 0
    with bar(title, unit="samples", shown=progress) as tell:
        for index, batch in enumerate(loader, start=1):
            yield batch
            seen += batch_size(batch)
            if batches is not None and index >= batches:
                return
            if samples is not None and seen >= samples:
                return
            tell(seen, _least(samples, None if length is None else seen / index * length))


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)
