"""Tensors on their way from one norm to another: handed over, lent, taken along to a place."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from normswap.norms.state import NormState

__all__ = ["anchor", "follow", "hand_over", "lent", "model_place", "take_back", "tensor_of"]


def model_place(model: nn.Module) -> Tensor:
    """A floating-point tensor of the model, for its device and dtype."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def anchor(module: nn.Module, place: Tensor) -> Tensor:
    """A tensor that tells where a norm is and in which precision: its own, or the model's."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.is_floating_point()), place)


def tensor_of(holder: nn.Module | NormState, name: str) -> Tensor:
    """A tensor by its name, which has to be one."""
    tensor = getattr(holder, name)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{type(holder).__name__}.{name} is no tensor")
    return tensor


def lent(norm: nn.Module, original: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which parameters of an original its replacement's children hold: by path, as it calls them.

    Args:
        norm: the replacement.
        original: the norm that it replaces.
        names: what the original calls parameters that it does not hand over as its own.
    """
    called = {id(p): name for name, p in original._parameters.items() if name in names}
    held = norm.named_parameters(remove_duplicate=False)
    return {path: called[id(p)] for path, p in held if id(p) in called}


def take_back(to: nn.Module, current: nn.Module, paths: Mapping[str, str]) -> set[str]:
    """Let ``to`` hold again what was `lent`, as far as it is still there; returns its names."""
    there = dict(current.named_parameters(remove_duplicate=False))
    back = {name: there[path] for path, name in paths.items() if path in there}
    to._parameters.update(back)
    return set(back)


def hand_over(to: nn.Module, current: nn.Module, names: frozenset[str]) -> None:
    """Let ``to`` hold the very tensors that ``current`` holds now under these names.

    A buffer that became a parameter, as of a norm frozen by its class, becomes a buffer again.
    """
    for name in names & current._parameters.keys():
        parameter = current._parameters[name]
        if to._parameters.get(name) is not None:
            to._parameters[name] = parameter
        elif to._buffers.get(name) is not None and parameter is not None:
            to._buffers[name] = parameter.detach()
    for name in names & current._buffers.keys():
        if to._buffers.get(name) is not None:
            to._buffers[name] = current._buffers[name]


def follow(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, *, skip: Collection[str]
) -> None:
    """Move the module's own tensors, except those named, to a device and if given to a dtype."""

    def moved(tensor: Tensor) -> Tensor:
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta and device.type != "meta":
            return torch.empty_like(tensor, dtype=to, device=device)
        return tensor.detach().to(device=device, dtype=to)

    for name, parameter in module._parameters.items():
        if parameter is None or name in skip:
            continue
        if parameter.is_meta and device.type != "meta":  # such data cannot be set
            flag = parameter.requires_grad
            module._parameters[name] = nn.Parameter(moved(parameter), requires_grad=flag)
        else:
            parameter.data = moved(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in skip:
            module._buffers[name] = moved(buffer)
