"""Norms that are a squashing function: how they start from statistics, and from none."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.swap.helpers import CHANNELS, SOURCES, batch_net, filled, numbers, outputs, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CURVES = ("dyt", "derf")
#: Derivatives of the functions at zero.
RISE = {"dyt": 1.0, "derf": 2 / math.sqrt(math.pi)}

each_curve = pytest.mark.parametrize("curve", CURVES)


def swap(model: nn.Module, target: str, **arguments: Any) -> Any:
    return normswap.convert(model, target, where="*", **arguments)


def promised(model: nn.Module, target: str, **arguments: Any) -> str:
    (fidelity,) = {str(s.fidelity) for s in normswap.plan(model, target, where="*", **arguments)}
    return fidelity


@each_curve
@pytest.mark.parametrize("source", ["LayerNorm", "RMSNorm"])
def test_from_a_norm_without_statistics_weight_and_bias_are_as_they_were(
    curve: str, source: str
) -> None:
    model = SOURCES[source].model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert promised(model, curve) == "affine"
    swap(model, curve)
    after = dict(model.named_parameters())
    assert all(same_bits(after[name], value) for name, value in before.items())
    assert model.norm1.alpha.tolist() == [0.5]
    assert (model.norm1.bias is None) == (source == "RMSNorm")


@each_curve
@pytest.mark.parametrize("options", [{}, {"kappa": 0.1}, {"alpha": 0.25}])
def test_from_statistics_the_slope_at_zero_is_the_sources(
    curve: str, options: dict[str, float]
) -> None:
    model = batch_net(eps=1e-3).double()
    norm = copy.deepcopy(model[1])
    root = (norm.running_var + 1e-3).sqrt()
    slope = (norm.weight / root).detach()
    offset = (norm.bias - norm.running_mean * norm.weight / root).detach()
    square = (norm.running_var + norm.running_mean**2).mean()
    alpha = options.get("alpha", options.get("kappa", 0.5) / square.sqrt())
    assert promised(model, curve, **options) == "matched"
    swap(model, curve, **options)
    torch.testing.assert_close(
        model[1].alpha.double(), torch.as_tensor(alpha).double().view(1), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        model[1].weight.double(), slope / alpha / RISE[curve], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(model[1].bias.double(), offset, rtol=1e-12, atol=1e-12)


@each_curve
def test_the_smaller_kappa_the_nearer_to_the_source(curve: str) -> None:
    model = batch_net().eval()
    x = numbers(4, CHANNELS, 6, 6) * model[1].running_var.sqrt()[:, None, None]
    x = x + model[1].running_mean[:, None, None]
    expected = outputs(model[1], x)
    errors = []
    for kappa in (1.0, 0.5, 0.1, 0.01):
        converted = swap(copy.deepcopy(model), curve, kappa=kappa)
        error = (outputs(converted[1], x) - expected).norm() / expected.norm()
        errors.append(float(error))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_from_one_curve_to_the_other_the_slope_at_zero_stays() -> None:
    model = swap(batch_net(), "dyt")
    with torch.no_grad():
        model[1].alpha.fill_(0.3)
    swap(model, "derf")
    torch.testing.assert_close(model[1].alpha, torch.tensor([0.3 / RISE["derf"]]))


@each_curve
@pytest.mark.parametrize("options", [{}, {"alpha": 0.25}, {"kappa": 0.3}])
def test_twice_is_once(curve: str, options: dict[str, float]) -> None:
    model = swap(batch_net(), curve, **options)
    first = model[1]
    assert swap(model, curve, **options)[1] is first


@each_curve
def test_fresh_is_as_the_paper_starts(curve: str) -> None:
    model = swap(batch_net(), curve, carry="fresh")
    state = model[1].state_dict()
    assert state["alpha"].tolist() == [0.5]
    assert (state["weight"] == 1).all()
    assert (state["bias"] == 0).all()


@each_curve
def test_a_model_without_weights_gets_the_papers_alpha_until_they_are_loaded(curve: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    swap(model, curve)
    assert model[1].alpha.is_meta
    loaded = swap(batch_net(), curve)
    model.load_state_dict(loaded.state_dict(), assign=True)
    x = numbers(2, 3, 4, 4)
    assert same_bits(outputs(model, x), outputs(loaded, x))


@each_curve
def test_what_samples_hold_does_not_reach_each_other(curve: str) -> None:
    norm = filled(normswap.build(curve, CHANNELS)).train()
    x = numbers(4, CHANNELS, 3, 3)
    assert same_bits(norm(x)[:1], norm(x[:1]))


@each_curve
@pytest.mark.parametrize("option", ["alpha", "kappa"])
@pytest.mark.parametrize("value", [0, -1.0, "much", True, math.inf])
def test_what_an_option_has_to_be(curve: str, option: str, value: object) -> None:
    with pytest.raises(normswap.errors.OptionError, match=option):
        normswap.spec(curve, **{option: value})
