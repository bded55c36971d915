"""What ``to`` may be: classes, factories of the number of channels, functions of the site."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NothingToConvert, OptionError
from tests.swap.helpers import CHANNELS, Snapshot, batch_net, filled, image, outputs


class Gain(nn.Module):
    """Of no class that normswap knows: a gain per channel, and nothing else."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_features,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1)


def net() -> Any:
    return filled(
        nn.Sequential(
            nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.2),
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 1), nn.BatchNorm2d(2 * CHANNELS),
        )
    )  # fmt: skip


FACTORIES = {
    "a class": nn.SyncBatchNorm,
    "a part of a class": partial(nn.GroupNorm, 4),
    "a function": lambda channels: nn.GroupNorm(4, channels),
    "a class of its own": Gain,
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_is_asked_for_each_number_of_channels(name: str) -> None:
    model = normswap.convert(net(), FACTORIES[name])
    for index, channels in ((1, CHANNELS), (3, 2 * CHANNELS)):
        assert not isinstance(model[index], nn.BatchNorm2d)
        assert model[index].weight.shape == (channels,)
    assert outputs(model, image()).shape == (4, 2 * CHANNELS, 6, 6)


@pytest.mark.parametrize("name", FACTORIES)
def test_it_goes_back_and_the_same_call_twice_equals_once(name: str) -> None:
    model = net()
    before = Snapshot(model)
    once = Snapshot(normswap.convert(model, FACTORIES[name]))
    normswap.convert(model, FACTORIES[name])
    once.assert_kept(model, untouched=True)
    before.assert_kept(normswap.revert(model))


def test_what_is_at_the_classs_default_stays_the_sources() -> None:
    model = normswap.convert(net(), nn.SyncBatchNorm)
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.2)
    assert normswap.report(model)[0].fidelity == "exact"


def test_what_is_set_in_the_factory_is_meant() -> None:
    model = normswap.convert(net(), lambda channels: nn.GroupNorm(2, channels, eps=0.5))
    assert (model[1].num_groups, model[1].eps) == (2, 0.5)
    assert normswap.report(model)[0].fidelity == "matched"


def test_a_class_of_its_own_takes_the_affine_that_it_has() -> None:
    model = net()
    weight = model[1].weight
    normswap.convert(model, Gain)
    assert type(model[1]) is Gain
    assert model[1].weight is weight
    assert normswap.report(model)[0].fidelity == "affine"


def test_a_layer_norm_over_the_width_is_refused_with_the_way_out() -> None:
    with pytest.raises(NothingToConvert, match="ln2d"):
        normswap.convert(net(), nn.LayerNorm)


def test_a_class_of_its_own_cannot_take_an_activation() -> None:
    timm = pytest.importorskip("timm.layers")
    model = nn.Sequential(timm.BatchNormAct2d(CHANNELS))
    with pytest.raises(NothingToConvert, match="activation"):
        normswap.convert(model, Gain)


SITE_FUNCTIONS = {
    "names": lambda site: "gn" if site.num_features > CHANNELS else "in",
    "specs": lambda site: normswap.spec("gn", num_groups=2),
    "classes": lambda site: nn.SyncBatchNorm if site.path == "1" else "gn",
    "modules": lambda site: nn.GroupNorm(2, site.num_features),
    "nothing": lambda site: "gn" if site.path == "1" else None,
}


@pytest.mark.parametrize("name", SITE_FUNCTIONS)
def test_a_function_of_the_site_gives_any_of_these(name: str) -> None:
    model = net()
    before = Snapshot(model)
    normswap.convert(model, SITE_FUNCTIONS[name])
    assert not isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[3], nn.BatchNorm2d) is (name == "nothing")
    once = Snapshot(model)
    normswap.convert(model, SITE_FUNCTIONS[name])
    once.assert_kept(model, untouched=True)
    before.assert_kept(normswap.revert(model))


def test_values_of_a_mapping_may_be_any_of_these() -> None:
    model = normswap.convert(net(), {"1": nn.SyncBatchNorm, "3": lambda c: nn.GroupNorm(2, c)})
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(model[3], nn.GroupNorm)


BAD = {
    "a number": 3,
    "a class that takes more": nn.GroupNorm,
    "a function that gives no module": lambda site: 3,
    "no module class": int,
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_target_is_refused(name: str) -> None:
    model = batch_net()
    before = Snapshot(model)
    with pytest.raises(OptionError):
        normswap.convert(model, BAD[name])
    before.assert_kept(model, untouched=True)


def test_an_error_in_a_function_of_the_site_is_its_own() -> None:
    def broken(site: Any) -> Any:
        return site.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        normswap.convert(batch_net(), broken)


def test_a_class_takes_its_options_itself() -> None:
    with pytest.raises(OptionError, match="eps"):
        normswap.convert(batch_net(), nn.SyncBatchNorm, eps=1)


class Shaped(nn.Module):
    """Of no class that normswap knows: its affine is not (C,)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, num_features, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize(("to", "carry"), [(Shaped, "auto"), (Gain, "fresh")])
def test_a_class_of_its_own_keeps_the_affine_that_does_not_fit(to: Any, carry: str) -> None:
    model = normswap.convert(batch_net(), to, carry=carry)
    assert (model[1].weight.flatten() == (3 if to is Shaped else 5)).all()
    assert outputs(model, image()).shape == (4, CHANNELS, 6, 6)


class Remembers(nn.Module):
    """Makes nothing of its argument but a note."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("to", [lambda c: Remembers(c), lambda planes: Remembers(planes)])
def test_a_function_of_channels_is_told_by_its_parameter(to: Any) -> None:
    assert normswap.convert(batch_net(), to)[1].num_features == CHANNELS


def test_a_function_of_channels_that_looks_them_up() -> None:
    groups = {CHANNELS: 4}
    model = normswap.convert(batch_net(), lambda width: nn.GroupNorm(groups[width], width))
    assert model[1].num_groups == 4
