"""What a norm pools over, measured: which inputs one of its outputs depends on."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normswap.norms.registry import list_norms, lookup
from normswap.norms.spec import NormSpec, build, spec
from normswap.randomness import kept_random_state

__all__ = ["SUITED", "dependence", "measured", "suited"]

#: By this much an input is changed, and by more than this an output has to change.
STEP, CHANGE = 0.5, 1e-9

#: Options of a size as they suit a block of few values, where the defaults would take it whole.
SUITED = {"num_groups": 2, "group_size": 2, "window": 2}


def suited(names: Iterable[str] = ()) -> list[NormSpec]:
    """Norms with options that suit a block of few values.

    Args:
        names: registry names or aliases. None: all norms that are layers of their own.

    Raises:
        UnknownNorm: no norm has the name.
    """
    entries = [lookup(name) for name in names]
    return [
        spec(entry.name, **{o.name: SUITED[o.name] for o in entry.options if o.name in SUITED})
        for entry in entries or (entry for entry in list_norms() if entry.stands_alone)
    ]


def measured(norm: NormSpec, shape: tuple[int, ...], *, training: bool) -> Tensor:
    """`dependence` of a norm that is built for it, in training or in eval mode."""
    with kept_random_state():
        built = build(norm.name, shape[1], dim=len(shape) - 2, **norm.options)
    return dependence(built.train(training), shape)


@torch.no_grad()
def dependence(norm: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Which inputs one output depends on, found by changing them one by one.

    Args:
        norm: of C channels; it stays as it is.
        shape: of the input, (N, C, ...).

    Returns:
        Booleans (N, C, L) for the output at the first sample, channel and position, where L
        counts the positions.
    """
    norm = copy.deepcopy(norm).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = torch.empty(x.numel(), dtype=torch.bool)
    with kept_random_state():
        output = _first_output(norm, x)
        for index in range(x.numel()):
            other = x.clone()
            other.view(-1)[index] += STEP
            changed[index] = bool((_first_output(norm, other) - output).abs() > CHANGE)
    return changed.view(*shape[:2], -1)


def _first_output(norm: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # a norm that draws random numbers draws the same ones
    output: Tensor = copy.deepcopy(norm)(x)  # and starts from the same statistics
    return output.flatten()[0]
