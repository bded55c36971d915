"""Local context normalization beyond its formula: its ends, its precision, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling, OptionError
from normswap.norms.furnish import furnish
from normswap.norms.state import fresh_state
from tests.norms.beyond import CHANNELS
from tests.reference.data import close, fill, values


@pytest.mark.parametrize("shape", [(3, CHANNELS, 5), (3, CHANNELS, 5, 4), (3, CHANNELS, 2, 3, 4)])
def test_a_window_over_the_whole_map_is_group_norm(shape: tuple[int, ...]) -> None:
    norm = fill(normswap.build("lcn", CHANNELS, dim=len(shape) - 2))
    group = fill(nn.GroupNorm(CHANNELS // 2, CHANNELS))
    close(norm(values(*shape)), group(values(*shape)))


def test_far_from_the_border_only_the_window_counts() -> None:
    norm = normswap.build("lcn", CHANNELS, window=3).double()
    x = values(1, CHANNELS, 9, 9)
    other = x.clone()
    other[..., :3, :], other[..., 6:, :], other[..., :3], other[..., 6:] = 7, 8, 9, 10
    close(norm(x)[..., 4, 4], norm(other)[..., 4, 4])
    other[..., 5, 5] += 1
    assert (norm(x)[..., 4, 4] - norm(other)[..., 4, 4]).abs().min() > 1e-3


@torch.no_grad()
def test_a_large_mean_does_not_cancel_in_single_precision() -> None:
    x = (values(1, CHANNELS, 160, 160) + 150).float()
    norm = normswap.build("lcn", CHANNELS, window=7)
    expected = normswap.build("lcn", CHANNELS, window=7).double()(x.double())
    assert (norm(x).double() - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_flat_region_beside_a_lively_one_stays_flat() -> None:
    x = torch.full((1, 2, 40, 40), 3.0)
    x[..., 20:] = 1e3 * values(1, 2, 40, 20).float()
    y = normswap.build("lcn", 2, window=5)(x)
    assert y.isfinite().all()
    assert y[..., :15].abs().max() < 1e-2


def test_the_input_is_left_as_it_is() -> None:
    x = values(2, CHANNELS, 5, 5)
    before = x.clone()
    normswap.build("lcn", CHANNELS, window=3).double()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("channels", "expected"), [(1, 1), (2, 2), (6, 2), (9, 3), (7, 7)])
def test_groups_have_two_channels_or_the_least_that_divides(channels: int, expected: int) -> None:
    assert normswap.build("lcn", channels).channels_per_group == expected


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"channels_per_group": 1, "window": 1}, (2, CHANNELS, 5, 5)),
        ({"channels_per_group": 1}, (2, CHANNELS, 1, 1)),
        ({"channels_per_group": 1}, (2, CHANNELS)),
    ],
)
def test_a_window_of_a_single_value_is_refused(
    options: dict[str, int], shape: tuple[int, ...]
) -> None:
    with pytest.raises(DegeneratePooling, match="larger window"):
        normswap.build("lcn", CHANNELS, **options)(torch.ones(shape))


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": True}, {"window": (3, 3)}, {"channels_per_group": 4}]
)
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.build("lcn", CHANNELS, **options)


def test_windows_have_two_dimensions_where_the_channels_come_last() -> None:
    state = replace(fresh_state(CHANNELS, dim=2), channel_dim=-1)
    made = furnish(state, normswap.spec("lcn", window=3).start(state)).module.double()
    norm, x = normswap.build("lcn", CHANNELS, window=3).double(), values(2, CHANNELS, 5, 4)
    close(made(x.movedim(1, -1)), norm(x).movedim(1, -1))


def test_from_running_statistics_it_starts_as_group_norm_does() -> None:
    model = fill(nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    model[0].running_mean.copy_(values(CHANNELS, seed=1))
    model[0].running_var.copy_(values(CHANNELS, seed=2).abs() + 0.3)
    (step,) = normswap.plan(model, "lcn")
    assert step.fidelity == "matched"
    found = {}
    for target, options in (("lcn", {}), ("gn", {"channels_per_group": 2})):
        with normswap.converted(model, target, **options):
            found[target] = {n: p.detach().clone() for n, p in model[0].named_parameters()}
    assert found["lcn"].keys() == {"weight", "bias"}
    for name, value in found["gn"].items():
        close(found["lcn"][name], value)
