"""A statistic over a single value would erase the input, so such layers refuse to run."""

from __future__ import annotations

import pytest
import torch

from normswap import build
from normswap.errors import DegeneratePooling, NormSwapError
from tests.norms.cases import CHANNELS, start
from tests.reference.data import values

SINGLE = [
    pytest.param("gn", {"num_groups": CHANNELS}, CHANNELS, id="gn"),
    pytest.param("in", {}, CHANNELS, id="in"),
    pytest.param("cn", {"unbiased": False}, CHANNELS, id="cn"),
    pytest.param("ln", {}, 1, id="ln"),
    pytest.param("rms", {}, 1, id="rms"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "options", "channels"), SINGLE)
def test_a_map_of_one_position_is_refused(
    norm: str, options: dict[str, int], channels: int, training: bool
) -> None:
    module = build(norm, channels, **options).train(training)
    with pytest.raises(DegeneratePooling, match="single value"):
        module(torch.ones(2, channels, 1, 1))


@pytest.mark.parametrize(("norm", "options", "channels"), SINGLE)
def test_two_positions_are_enough(norm: str, options: dict[str, int], channels: int) -> None:
    module = build(norm, channels, **options)
    x = torch.tensor([-1.0, 1.0]).expand(2, channels, 1, 2)
    torch.testing.assert_close(module(x), x, rtol=0, atol=1e-4)


def test_a_group_of_two_channels_may_have_one_position() -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(3).view(1, CHANNELS, 1, 1)
    module = build("gn", CHANNELS, channels_per_group=2)
    torch.testing.assert_close(module(x), x, rtol=0, atol=1e-4)


def test_a_layer_norm_of_maps_may_have_one_position() -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(3).view(1, CHANNELS, 1, 1)
    torch.testing.assert_close(build("ln", CHANNELS)(x), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", ["ln2d", "rms2d"])
def test_one_channel_at_each_position_is_refused(norm: str) -> None:
    with pytest.raises(DegeneratePooling):
        build(norm, 1)(torch.ones(2, 1, 4, 4))


@pytest.mark.parametrize("norm", ["gn", "in"])
def test_one_token_of_many_channels_is_one_position(norm: str) -> None:
    options = {"num_groups": CHANNELS} if norm == "gn" else {}
    module = start(norm, channel_dim=-1, **options)
    with pytest.raises(DegeneratePooling):
        module(values(2, 1, CHANNELS))


def test_a_tracked_instance_norm_evaluates_one_position() -> None:
    module = build("in", CHANNELS, track_running_stats=True).eval()
    x = torch.ones(2, CHANNELS, 1, 1)
    torch.testing.assert_close(module(x), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_a_batch_of_one_value_is_refused_in_training(norm: str) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        build(norm, CHANNELS)(torch.ones(1, CHANNELS, 1, 1))


def test_the_message_names_the_place_and_the_way_out() -> None:
    module = build("gn", CHANNELS, num_groups=CHANNELS)
    module.site_path = "layer4.bn2"
    with pytest.raises(DegeneratePooling, match=r"layer4\.bn2 \(GroupNorm\).*skip="):
        module(torch.ones(2, CHANNELS, 1, 1))


def test_the_error_is_one_of_the_librarys() -> None:
    assert issubclass(DegeneratePooling, NormSwapError)
