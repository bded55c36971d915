"""What stands around a norm: what feeds it, what follows, how often and when it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.graph.site import NormSite
from tests.graph.models import CHANNELS, Around, Branching, Residual, block

Forward = Callable[[Around, Tensor], Tensor]


def site_of(forward: Forward) -> NormSite:
    """The only norm of a model with this forward."""
    (site,) = normswap.find(Around(forward))
    return site


def test_a_convolution_feeds_it() -> None:
    assert site_of(lambda m, x: m.norm(m.conv(x))).producer == "conv"


def test_a_linear_feeds_it() -> None:
    (site,) = normswap.find(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    assert site.producer == "0"


def test_an_identity_between_is_seen_through() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Identity(), nn.BatchNorm2d(3))
    assert normswap.find(model)[0].producer == "0"


def test_a_convolution_two_modules_up_is_named_by_its_whole_path() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 1)), nn.Sequential(nn.BatchNorm2d(3)))
    assert normswap.find(model)[0].producer == "0.0"


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.norm(x), id="the input"),
        pytest.param(lambda m, x: m.norm(m.conv(x) + x), id="a sum"),
        pytest.param(lambda m, x: m.norm(F.relu(m.conv(x))), id="an activation"),
        pytest.param(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), id="two convolutions"),
    ],
)
def test_what_is_not_one_convolution_is_no_producer(forward: Forward) -> None:
    assert site_of(forward).producer is None


def test_a_convolution_that_feeds_it_at_every_call_is_the_producer() -> None:
    assert site_of(lambda m, x: m.norm(m.conv(m.norm(m.conv(x))))).producer == "conv"


def test_an_activation_module_follows() -> None:
    assert normswap.find(block())[0].activation == "2"


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU])
def test_torchs_activations_are_known(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), activation())
    assert normswap.find(model)[0].activation == "1"


def test_an_identity_before_the_activation_is_seen_through() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())
    assert normswap.find(model)[0].activation == "2"


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        pytest.param(lambda m, x: F.relu(m.norm(x)), "relu", id="F.relu"),
        pytest.param(lambda m, x: F.relu(m.norm(x), inplace=True), "relu", id="F.relu in place"),
        pytest.param(lambda m, x: torch.relu(m.norm(x)), "relu", id="torch.relu"),
        pytest.param(lambda m, x: torch.relu_(m.norm(x)), "relu_", id="torch.relu_"),
        pytest.param(lambda m, x: m.norm(x).relu(), "relu", id="a method"),
        pytest.param(lambda m, x: m.norm(x).sigmoid(), "sigmoid", id="another method"),
        pytest.param(lambda m, x: F.silu(m.norm(x)), "silu", id="F.silu"),
        pytest.param(lambda m, x: F.gelu(m.norm(x)), "gelu", id="F.gelu"),
    ],
)
def test_a_function_or_method_follows(forward: Forward, name: str) -> None:
    assert site_of(forward).activation == name


def two_readers(model: Around, x: Tensor) -> Tensor:
    y = model.norm(x)
    return F.relu(y) + y


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.norm(x), id="nothing"),
        pytest.param(lambda m, x: m.other(m.norm(x)), id="a convolution"),
        pytest.param(two_readers, id="an activation and something else"),
        pytest.param(lambda m, x: F.relu(m.norm(x)) + m.norm(x), id="at one call of two"),
    ],
)
def test_what_does_not_always_follow_is_no_activation(forward: Forward) -> None:
    assert site_of(forward).activation is None


def test_an_activation_after_a_sum_is_not_the_norms() -> None:
    assert normswap.find(Residual())[0].activation is None


def test_a_fused_activation_is_named_by_its_path() -> None:
    norm = normswap.build("gn", CHANNELS)
    norm.drop, norm.act = nn.Identity(), nn.ReLU()
    norm.tail = ("drop", "act")
    assert normswap.find(nn.Sequential(norm))[0].activation == "0.act"


def test_a_fused_identity_is_no_activation() -> None:
    norm = normswap.build("gn", CHANNELS)
    norm.act = nn.Identity()
    norm.tail = ("act",)
    assert normswap.find(nn.Sequential(norm))[0].activation is None


def test_a_norm_with_layers_inside_is_seen_whole() -> None:
    norm = normswap.build("gn", CHANNELS)
    norm.act = nn.ReLU()
    norm.tail = ("act",)
    sites = normswap.find(nn.Sequential(nn.Conv2d(2, CHANNELS, 1), norm))
    assert sites.blind == {}
    assert sites[0].producer == "0"


def test_a_norm_called_by_keyword_has_the_same_surroundings() -> None:
    site = site_of(lambda m, x: F.relu(m.norm(input=m.conv(x))))
    assert (site.producer, site.activation, site.calls) == ("conv", "relu", 1)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_calls_are_counted(times: int) -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    model = nn.Sequential(*[module for _ in range(times) for module in (norm, nn.ReLU())])
    assert normswap.find(model)[0].calls == times


def test_calls_through_a_shared_parent_are_counted() -> None:
    shared = block()
    assert normswap.find(nn.Sequential(shared, shared))[0].calls == 2


def test_a_norm_that_the_forward_leaves_out_is_called_never() -> None:
    model = Around(lambda m, x: m.conv(x))
    (site,) = normswap.find(model)
    assert (site.calls, site.order) == (0, None)


class Backwards(nn.Sequential):
    """Calls its children from last to first."""

    def forward(self, x: Tensor) -> Tensor:
        for child in reversed(self):
            x = child(x)
        return x


def orders(model: nn.Module) -> dict[str, int | None]:
    return {site.path: site.order for site in normswap.find(model)}


def test_order_is_that_of_the_calls() -> None:
    model = Backwards(*[nn.BatchNorm2d(CHANNELS) for _ in range(3)])
    assert orders(model) == {"2": 0, "1": 1, "0": 2}


def test_order_goes_on_inside_a_part_that_was_traced_on_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), Branching(), nn.BatchNorm2d(CHANNELS))
    found = orders(model)
    assert sorted(found, key=found.__getitem__) == ["0", "1.inside.1", "2"]


def test_a_part_traced_on_its_own_is_counted_at_each_of_its_calls() -> None:
    part = Branching()
    (site,) = normswap.find(nn.Sequential(part, part))
    assert site.calls == 2


def test_parts_inside_parts_traced_on_their_own_are_counted_once() -> None:
    (site,) = normswap.find(nn.Sequential(Branching(Branching())))
    assert site.calls == 1
