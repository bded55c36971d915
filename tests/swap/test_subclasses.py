"""Subclasses of norms, and attributes of the user's own on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from tests.swap.helpers import (
    CHANNELS,
    OWN,
    OWN_BUFFERS,
    TARGETS,
    TRACKING,
    Doubled,
    NormReLU,
    Snapshot,
    batch_net,
    filled,
    image,
    numbers,
    outputs,
    same_bits,
    train_step,
)

OTHERS = [name for name in TARGETS if name != "bn"]
TRAINABLE = ["sync_bn", "gn", "in", "ln"]


# -- subclasses that compute something else --------------------------------------------------------


class ScaledGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class InheritedReLU(NormReLU):
    """Does not override forward itself: its base does."""


UNKNOWN = {
    "NormReLU": lambda: NormReLU(CHANNELS),
    "InheritedReLU": lambda: InheritedReLU(CHANNELS),
    "ScaledGroupNorm": lambda: ScaledGroupNorm(2, CHANNELS),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("target", TARGETS)
def test_a_forward_of_its_own_is_skipped_with_the_reason_and_never_rebuilt(
    name: str, target: str
) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8))
    model = filled(nn.ModuleDict({"other": other, "odd": UNKNOWN[name]()}))
    odd = model["odd"]
    before = Snapshot(odd)
    with pytest.warns(normswap.NormSwapWarning, match="overrides the forward of"):
        normswap.convert(model, target, where="*")
    assert model["odd"] is odd
    before.assert_kept(odd, untouched=True)
    (row,) = [row for row in normswap.report(model) if row.path == "odd"]
    assert row.fidelity is None
    assert "overrides the forward of" in row.reason
    assert "skip=" in row.reason


# -- subclasses that compute the same ------------------------------------------------------------


class UpcastLayerNorm(nn.LayerNorm):
    """Its base's function in a forward of its own, and its base's keys."""

    def forward(self, x: Tensor) -> Tensor:
        size, given = self.normalized_shape, x.dtype
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), size, weight, bias, self.eps).to(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_of_its_own_that_computes_the_same_is_recognised(dtype: torch.dtype) -> None:
    model = filled(nn.Sequential(nn.Linear(3, CHANNELS), UpcastLayerNorm(CHANNELS))).to(dtype)
    x, keys = numbers(2, 5, 3).to(dtype), list(model.state_dict())
    before, weight = model(x), model[1].weight
    (site,) = normswap.find(model)
    assert "by behaviour" in site.recognised
    normswap.convert(model, "ln2d", where="*")
    assert not isinstance(model[1], UpcastLayerNorm)
    assert model[1].weight is weight
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before)


class Tagged(nn.BatchNorm2d):
    """Has an argument, a class attribute, a property and a method of its own."""

    group = "none"

    def __init__(self, num_features: int, tag: str) -> None:
        super().__init__(num_features)
        self.tag = tag

    @property
    def size(self) -> int:
        return self.num_features


def tagged() -> Any:
    model = filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), Tagged(CHANNELS, "first")))
    model[1].group = "decoder"
    return model


@pytest.mark.parametrize("target", TRAINABLE)
def test_a_subclass_with_its_bases_forward_is_converted(target: str) -> None:
    model, plain = tagged(), batch_net()
    plain.load_state_dict(model.state_dict())
    normswap.convert(model, target)
    normswap.convert(plain, target)
    assert type(model[1]) is type(plain[1])
    assert same_bits(outputs(model, image()), outputs(plain, image()))


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("target", OTHERS)
def test_what_a_subclass_keeps_on_its_instances_survives(target: str) -> None:
    """An argument that it kept, and an instance's value of an attribute of the class."""
    model = normswap.convert(tagged(), target, where="*")
    assert model[1].tag == "first"
    assert model[1].group == "decoder"


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("target", OTHERS)
def test_a_subclass_comes_back(target: str) -> None:
    model = tagged()
    before = Snapshot(model)
    normswap.revert(normswap.convert(model, target, where="*"))
    before.assert_kept(model)
    assert model[1].size == CHANNELS


# -- attributes ---------------------------------------------------------------------------------

#: Names that a user may have chosen, and that normswap might use for itself.
NAMES = ["tag", "name", "path", "dim", "tail", "own", "sync", "like", "channel_dim", "trainable"]


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", OTHERS)
def test_an_attribute_of_the_users_does_no_harm_whatever_its_name(target: str, name: str) -> None:
    model, plain = batch_net(), normswap.convert(batch_net(), target, where="*")
    value = object()
    setattr(model[1], name, value)
    before = Snapshot(model)
    normswap.convert(model, target, where="*")
    for train in (False, True):
        x = image()
        model.train(train)
        plain.train(train)
        with torch.no_grad():
            assert same_bits(model(x), plain(x))
    normswap.revert(model)
    assert getattr(model[1], name) is value
    assert type(model[1]) is type(before.modules["1"])


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("target", OTHERS)
def test_modules_and_parameters_of_the_users_own_survive(target: str) -> None:
    model = batch_net()
    model[1].probe = probe = nn.Linear(2, 2)
    model[1].scale = scale = nn.Parameter(torch.ones(1))
    normswap.convert(model, target, where="*")
    assert model[1].probe is probe
    assert model[1].scale is scale
    assert {"1.probe.weight", "1.probe.bias", "1.scale"} <= set(model.state_dict())


@pytest.mark.parametrize("target", TRACKING[1:])
def test_statistics_that_are_not_saved_stay_unsaved(target: str) -> None:
    model = batch_net()
    model[1].register_buffer("running_mean", model[1].running_mean, persistent=False)
    keys = list(model.state_dict())
    assert "1.running_mean" not in keys
    new = [f"1.{name}" for name in (*OWN.get(target, ()), *OWN_BUFFERS.get(target, ()))]
    assert sorted(normswap.convert(model, target).state_dict()) == sorted(keys + new)


# -- parametrizations ---------------------------------------------------------------------------


def parametrized() -> Any:
    """A BatchNorm whose weight is twice a parameter."""
    model = batch_net()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    return model


@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn"])
def test_a_parametrized_weight_is_carried(target: str) -> None:
    model = parametrized()
    evaluated, keys = outputs(model, image()), list(model.state_dict())
    original = model[1].parametrizations.weight.original
    normswap.convert(model, target)
    assert parametrize.is_parametrized(model[1], "weight")
    assert model[1].parametrizations.weight.original is original
    assert list(model.state_dict()) == keys
    assert same_bits(outputs(model, image()), evaluated)


@pytest.mark.parametrize("target", ["gn", "in", "ln"])
def test_a_parametrized_weight_is_copied_where_asked(target: str) -> None:
    model = parametrized()
    weight = model[1].weight.detach().clone()
    original = model[1].parametrizations.weight.original
    normswap.convert(model, target, carry="copy")
    assert model[1].parametrizations.weight.original is original
    assert same_bits(model[1].weight, weight)


def test_a_parametrized_weight_trains_through_its_parametrization() -> None:
    model, expected = parametrized(), parametrized()
    normswap.convert(model, "sync_bn")
    for net in (model, expected):
        train_step(net, image(), torch.optim.SGD(net.parameters(), lr=0.1))
    assert same_bits(model[1].weight, expected[1].weight)


def test_a_parametrized_weight_is_held_by_a_frozen_bn() -> None:
    model = normswap.convert(parametrized(), "frozen_bn")
    before = model[1].weight.detach().clone()
    train_step(model, image(), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    assert same_bits(model[1].weight, before)


def test_a_parametrization_is_kept_over_two_conversions() -> None:
    model = parametrized()
    before = Snapshot(model)
    normswap.convert(normswap.convert(model, "sync_bn"), "gn", carry="copy")
    assert parametrize.is_parametrized(model[1], "weight")
    normswap.revert(model)
    before.assert_kept(model)


def test_a_parametrized_model_is_unharmed_by_an_identity() -> None:
    model = parametrized()
    before = Snapshot(model)
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(model, "identity")
    x = numbers(2, 3, 4, 4)
    assert same_bits(model(x), model[0](x))
    normswap.revert(model)
    before.assert_kept(model)
