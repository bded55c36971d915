"""A converted model in one file: its tensors, and the recipe that a fresh model needs first."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import RecipeError
from normswap.swap.apply import apply_steps, undo
from normswap.swap.recipe import recipe, recipe_plan

__all__ = ["load", "save"]

_KEY = "normswap"
_ALIASES = "aliases"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state dict as safetensors, with its recipe in the metadata.

    A tensor that the state dict has under several keys is written once.

    Args:
        model: a model, converted or not.
        path: the file to write.

    Raises:
        RecipeError: what was converted cannot be told in a recipe, or the state dict holds
            something that is no tensor.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise RecipeError(
                f"{name} in the state dict is a {type(value).__name__}, and safetensors holds "
                "tensors only; save this model by torch.save"
            )
        if value.is_meta:
            raise RecipeError(f"{name} is on the meta device and has no values to save")
        place = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        kept = first.setdefault(place, name) if value.numel() else name
        if kept == name:
            tensors[name] = _alone(value)
        else:
            aliases[name] = kept
    metadata = {"format": "pt", _KEY: json.dumps(recipe(model)), _ALIASES: json.dumps(aliases)}
    save_file(tensors, os.fspath(path), metadata=metadata)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Convert a fresh model as the saved one was, and give it the saved tensors.

    Args:
        model: a model made as the saved one was made, before its conversion.
        path: a file that `normswap.save` wrote.

    Returns:
        The model, as `normswap.convert` returns it.

    Raises:
        RecipeError: the file is of another model, or none of normswap's; the model is as it was.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RecipeError(f"{os.fspath(path)} is no safetensors file: {error}") from None
    if _KEY not in metadata:
        raise RecipeError(f"{os.fspath(path)} holds no recipe; write it by normswap.save")
    for name, kept in json.loads(metadata.get(_ALIASES, "{}")).items():
        tensors[name] = tensors[kept]
    planned = recipe_plan(model, json.loads(metadata[_KEY]), carry="copy")
    applied = apply_steps(model, planned or (), scoped=True)
    before = {name: value.clone() for name, value in applied.model.state_dict().items()}
    try:
        misfit = _misfit(applied.model, tensors)
        if misfit:
            raise RecipeError(f"{os.fspath(path)} is of another model: {misfit}")
        applied.model.load_state_dict(tensors)
    except BaseException:
        with torch.no_grad():
            for name, value in applied.model.state_dict().items():
                value.copy_(before[name])
        undo(applied)
        raise
    return applied.model


def _alone(tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: contiguous, in a storage of its own."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _misfit(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """What keeps the tensors from being this model's state dict; empty if nothing does."""
    own = model.state_dict()
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing:
        return f"it lacks {', '.join(sorted(missing)[:4])}"
    if unknown:
        return f"it has {', '.join(sorted(unknown)[:4])}, which the model has not"
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            return f"{name} is {tuple(tensor.shape)}, and the model's is {tuple(own[name].shape)}"
    return ""
