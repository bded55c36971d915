"""The drawings of a norm show what its statistics are pooled over, as the layer itself tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, UnknownNorm
from normswap.views.dependence import dependence, measured
from tests.reference.footprint import footprint

SAMPLES, CHANNELS, SIDE = 3, 4, 2
SHAPE = (SAMPLES, CHANNELS, SIDE, SIDE)

EVERY = slice(None)
POOLS: dict[str, tuple[dict[str, Any], tuple[slice, slice, slice]]] = {
    "bn": ({}, (EVERY, slice(1), EVERY)),
    "in": ({}, (slice(1), slice(1), EVERY)),
    "ln": ({}, (slice(1), EVERY, EVERY)),
    "gn": ({"num_groups": 2}, (slice(1), slice(CHANNELS // 2), EVERY)),
    "ln2d": ({}, (slice(1), EVERY, slice(1))),
    "identity": ({}, (slice(1), slice(1), slice(1))),
}

LAYERS = [norm.name for norm in normswap.list_norms() if norm.stands_alone]


def pool(*slices: slice) -> Tensor:
    expected = torch.zeros(SAMPLES, CHANNELS, SIDE * SIDE, dtype=torch.bool)
    expected[slices] = True
    return expected


@pytest.mark.parametrize("name", POOLS)
def test_an_output_depends_on_the_values_that_are_pooled(name: str) -> None:
    options, slices = POOLS[name]
    found = measured(normswap.spec(name, **options), SHAPE, training=True)
    assert torch.equal(found, pool(*slices))


def test_in_eval_mode_batch_norm_depends_on_the_value_alone() -> None:
    found = measured(normswap.spec("bn"), SHAPE, training=False)
    assert torch.equal(found, pool(slice(1), slice(1), slice(1)))


@pytest.mark.parametrize("name", LAYERS)
def test_measuring_changes_nothing(name: str) -> None:
    norm, random = normswap.build(name, CHANNELS), torch.get_rng_state()
    before = footprint(norm)
    found = dependence(norm, SHAPE)
    assert footprint(norm) == before
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(dependence(norm, SHAPE), found)


def test_a_norm_whose_statistics_move_is_drawn_as_it_starts() -> None:
    class Drifting(nn.BatchNorm2d):
        """Normalizes by the batch at first, and by what it has kept from its third call on."""

        def forward(self, input: Tensor) -> Tensor:
            self.training = int(self.num_batches_tracked) < 2
            return super().forward(input)

    found = dependence(Drifting(CHANNELS), SHAPE)
    assert torch.equal(found, pool(EVERY, slice(1), EVERY))


@pytest.mark.parametrize("name", LAYERS)
def test_every_norm_that_can_be_built_can_be_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    random = torch.get_rng_state()
    normswap.draw(name, tmp_path / "norm.png")
    assert (tmp_path / "norm.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(random, torch.get_rng_state())


def test_the_text_shows_samples_channels_and_positions() -> None:
    *_, blank, name, first, second, third, last = normswap.draw_text(
        normswap.spec("gn", num_groups=3)
    ).splitlines()
    assert (blank, name, first) == ("", "gn", "×█░░░░ ░░░░░░ ░░░░░░")
    assert {second, third, last} == {"██░░░░ ░░░░░░ ░░░░░░"}


def test_the_text_shows_norms_side_by_side() -> None:
    *_, names, first, second, third, last = normswap.draw_text("BatchNorm", "lcn").splitlines()
    assert names.split() == ["bn", "lcn"]
    assert first == "×░░░░░ █░░░░░ █░░░░░    ×█░░░░ ░░░░░░ ░░░░░░"
    assert second == "█░░░░░ █░░░░░ █░░░░░    ██░░░░ ░░░░░░ ░░░░░░"
    assert third == last == "█░░░░░ █░░░░░ █░░░░░    ░░░░░░ ░░░░░░ ░░░░░░"


def test_the_text_in_eval_mode() -> None:
    drawn = normswap.draw_text("bn", training=False)
    assert drawn.splitlines()[5:] == ["×░░░░░ ░░░░░░ ░░░░░░", *["░░░░░░ ░░░░░░ ░░░░░░"] * 3]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNorm):
        normswap.draw_text("gn", "nonesuch")
    with pytest.raises(OptionError, match="num_groups"):
        normswap.draw_text(normswap.spec("gn", num_groups=4))
    pytest.importorskip("matplotlib")
    with pytest.raises(UnknownNorm):
        normswap.draw("nonesuch", tmp_path / "norm.png")
    with pytest.raises(OptionError, match="num_groups"):
        normswap.draw("gn", tmp_path / "norm.png", num_groups=4)
    with pytest.raises(OptionError, match="ending"):
        normswap.draw("gn", tmp_path / "norm.norm")
