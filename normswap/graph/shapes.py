"""The input shapes of norms, observed in one evaluation on example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.copying import structure_copy
from normswap.randomness import kept_random_state

__all__ = ["observe_shapes"]


def observe_shapes(
    model: nn.Module, example_inputs: Any, paths: Iterable[str]
) -> dict[str, list[tuple[int, ...]]]:
    """Run a copy of the model in eval mode and note the shape of each call's first input.

    Args:
        model: the model; it is not touched.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments.
        paths: the modules to watch.

    Returns:
        By path, one shape a call; an empty list for a module that was not called.

    Raises:
        Exception: whatever the forward raises.
    """
    seen: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}
    copied = structure_copy(model).eval()

    def watch(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(iter((*args, *kwargs.values())), None)
            if isinstance(first, Tensor):
                seen[path].append(tuple(first.shape))

        return note

    for path in seen:
        copied.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
    with torch.no_grad(), kept_random_state():
        if isinstance(example_inputs, Mapping):
            copied(**example_inputs)
        elif isinstance(example_inputs, (tuple, list)):
            copied(*example_inputs)
        else:
            copied(example_inputs)
    return seen
