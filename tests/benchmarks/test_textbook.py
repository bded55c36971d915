"""The formulas that layers are timed against compute what the layers compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from benchmarks.textbook import FORMULAS, Textbook
from tests.reference.data import close, fill, values

SHAPE = (4, 8, 5, 6)

LAYERS = [entry.name for entry in normswap.list_norms() if entry.stands_alone]
#: What norms are built with beside their defaults, so that what they do shows on a small map.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ghost_bn": [{"group_size": 2}, {"group_size": 3}],
    "gn": [{"num_groups": 2}],
    "iter_norm": [{"num_groups": 2}],
    "lcn": [{"window": 3}],
    "rn_l": [{"threshold": 0.5}],
    "an_wang": [{"num_regions": 3}],
    "bcn": [{"num_groups": 2}],
    "batch_renorm": [{"r_max": 1.5, "d_max": 0.5}],
}
CASES = [
    pytest.param(name, options, id=" ".join([name, *map(str, options.values())]))
    for name in LAYERS
    if name in FORMULAS
    for options in ({}, *OPTIONS.get(name, []))
]


def test_every_norm_that_normalizes_has_one() -> None:
    assert set(LAYERS) - set(FORMULAS) == {"identity"}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_formula_is_the_layer(name: str, options: dict[str, Any]) -> None:
    norm = spread(fill(normswap.build(name, SHAPE[1], **options)))
    textbook = Textbook(FORMULAS[name], copy.deepcopy(norm))
    for seed in range(3):
        for mine, theirs in zip(
            trained(norm, norm, seed), trained(textbook, textbook.norm, seed), strict=True
        ):
            close(mine, theirs)


def spread(norm: nn.Module) -> nn.Module:
    """Smaller numbers in a norm, which no softmax or sigmoid saturates by."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(0.3)
    return norm


def trained(run: Callable[[Tensor], Tensor], norm: nn.Module, seed: int) -> list[Tensor]:
    """Output, gradients and buffers of a step."""
    x, direction = values(*SHAPE, seed=seed).requires_grad_(), values(*SHAPE, seed=seed + 10)
    norm.zero_grad()
    torch.default_generator.manual_seed(seed)
    y = run(x)
    y.backward(direction)
    learned = [p.grad for p in norm.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *learned, *(buffer.double() for buffer in norm.buffers())]
