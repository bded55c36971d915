"""All that can be seen of a model from outside, for saying that something left no trace."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def footprint(model: nn.Module) -> dict[str, Any]:
    """Every attribute, tensor, mode and hook of every module, comparable by ``==``.

    Tensors appear as identity, place in memory, flags and bits, so that a tensor that was replaced
    by an equal one, or changed and moved back nearly, is told from an untouched one.
    """
    return {
        f"{path}.{name}": _seen(value)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
    }


def random_states() -> list[Any]:
    """The states of the generators of torch, Python and NumPy, comparable by ``==``."""
    name, keys, *rest = numpy.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


def _seen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (id(value), *_bits(value))
    if isinstance(value, Mapping):
        return [(key, _seen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_seen(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return id(value)


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    place = (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device)
    if tensor.device.type == "meta":
        return place
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return (*place, tensor.data_ptr(), flat.tolist())
