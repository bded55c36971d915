"""A norm that somebody else wrote becomes a target and a source, with all that these can do."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap import Fidelity, NormState, Rule, Start
from normswap.errors import OptionError
from normswap.norms import registry
from normswap.norms.pool import NOTHING


class Scale(nn.Module):
    """y = weight · x + bias, whatever the input."""

    def __init__(self, num_features: int, extra: int) -> None:
        super().__init__()
        self.num_features, self.extra = num_features, extra

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


def read(module: nn.Module) -> NormState:
    return NormState(
        norm="scale",
        kind="scale",
        num_features=module.num_features,
        rule=Rule.always(NOTHING),
        weight=module.weight,
        bias=module.bias,
        settings={"extra": module.extra},
    )


def start(state: NormState, *, carry: str = "auto", extra: int = 3) -> Start:
    return Start(
        fidelity=Fidelity.AFFINE,
        shell=lambda: Scale(state.num_features, extra),
        affine=("weight", "bias"),
        running=(),
        values=dict,
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))
    normswap.register("scale", reads={Scale: read}, aliases=("gain",), paper="none")(start)


def net() -> Any:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))


def test_it_is_listed_with_the_options_of_its_starter() -> None:
    entry = next(entry for entry in normswap.list_norms() if entry.name == "scale")
    assert [(option.name, option.default) for option in entry.options] == [("extra", 3)]
    assert "scale" in str(normswap.list_norms())


@pytest.mark.parametrize("name", ["scale", "gain", "SCALE"])
def test_it_is_a_target(name: str) -> None:
    model = net()
    weight = model[1].weight
    normswap.convert(model, name, extra=5)
    assert type(model[1]) is Scale
    assert model[1].weight is weight
    assert model[1].extra == 5


def test_it_is_a_source() -> None:
    model = normswap.convert(net(), "scale")
    assert normswap.find(model)[0].kind == "scale"
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(model, "gn", where="kind:scale")
    assert isinstance(model[1], nn.GroupNorm)
    assert type(normswap.revert(model)[1]) is nn.BatchNorm2d


def test_the_same_call_twice_equals_once() -> None:
    model = normswap.convert(net(), "scale")
    first = model[1]
    assert normswap.convert(model, "scale")[1] is first


def test_copies_and_recipes_know_it() -> None:
    model = pickle.loads(pickle.dumps(normswap.convert(net(), "scale", extra=7)))
    again = normswap.apply_recipe(net(), normswap.recipe(model))
    assert again[1].extra == 7


def test_an_option_that_its_starter_lacks() -> None:
    with pytest.raises(OptionError, match="extra"):
        normswap.spec("scale", extr=1)


def test_a_name_of_another_norm_is_taken() -> None:
    with pytest.raises(OptionError, match="taken by gn"):
        normswap.register("mine", reads={}, aliases=("group_norm",))(start)


def test_a_statistic_that_it_keeps_is_carried() -> None:
    def with_mean(state: NormState, *, carry: str = "auto") -> Start:
        return Start(
            fidelity=Fidelity.AFFINE,
            shell=lambda: Scale(state.num_features, 0),
            affine=("weight",),
            running=("running_mean",),
            values=lambda: {"weight": torch.full((8,), 2.0)},
        )

    normswap.register("keeper", reads={})(with_mean)
    model = net()
    mean = model[1].running_mean
    normswap.convert(model, "keeper")
    assert model[1].running_mean is mean
    assert model[1].bias is None
    assert (model[1].weight == 2).all()
    assert set(model[1].state_dict()) == {"weight", "running_mean"}
