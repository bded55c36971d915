"""The picture of a norm shows what its statistics are pooled over, as the layer itself tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normswap
from normswap.errors import OptionError, UnknownNorm
from normswap.views.norm_picture import CHANNELS, SAMPLES, SIDE, dependence

EVERY = slice(None)
POOLS: dict[str, tuple[dict[str, Any], tuple[slice, slice, slice]]] = {
    "bn": ({}, (EVERY, slice(1), EVERY)),
    "in": ({}, (slice(1), slice(1), EVERY)),
    "ln": ({}, (slice(1), EVERY, EVERY)),
    "gn": ({"num_groups": 2}, (slice(1), slice(CHANNELS // 2), EVERY)),
    "ln2d": ({}, (slice(1), EVERY, slice(1))),
    "identity": ({}, (slice(1), slice(1), slice(1))),
}

#: All but those that are no layers of their own.
LAYERS = [norm.name for norm in normswap.list_norms() if "neighbours" not in norm.needs]


def pool(*slices: slice) -> Tensor:
    expected = torch.zeros(SAMPLES, CHANNELS, SIDE * SIDE, dtype=torch.bool)
    expected[slices] = True
    return expected


@pytest.mark.parametrize("name", POOLS)
def test_an_output_depends_on_the_values_that_are_pooled(name: str) -> None:
    options, slices = POOLS[name]
    found = dependence(normswap.build(name, CHANNELS, **options))
    assert torch.equal(found, pool(*slices))


def test_in_eval_mode_batch_norm_depends_on_the_value_alone() -> None:
    found = dependence(normswap.build("bn", CHANNELS).eval())
    assert torch.equal(found, pool(slice(1), slice(1), slice(1)))


@pytest.mark.parametrize("name", LAYERS)
def test_every_norm_that_can_be_built_can_be_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    random = torch.get_rng_state()
    normswap.draw(name, tmp_path / "norm.png")
    assert (tmp_path / "norm.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(random, torch.get_rng_state())


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UnknownNorm):
        normswap.draw("nonesuch", tmp_path / "norm.png")
    with pytest.raises(OptionError, match="num_groups"):
        normswap.draw("gn", tmp_path / "norm.png", num_groups=4)
    with pytest.raises(OptionError, match="ending"):
        normswap.draw("gn", tmp_path / "norm.norm")
