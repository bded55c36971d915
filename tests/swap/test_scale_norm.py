"""ScaleNorm: an RMSNorm but for eps, and what it has where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling
from tests.swap.helpers import CHANNELS, SOURCES, batch_net, filled, numbers, outputs, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


def swap(model: nn.Module, target: str = "scale_norm", **arguments: Any) -> Any:
    return normswap.convert(model, target, where="*", **arguments)


def promised(model: nn.Module, target: str = "scale_norm", **arguments: Any) -> str:
    (fidelity,) = {str(s.fidelity) for s in normswap.plan(model, target, where="*", **arguments)}
    return fidelity


def test_without_eps_it_is_rms_norm() -> None:
    model = filled(nn.Sequential(nn.Linear(3, CHANNELS), nn.RMSNorm(CHANNELS, eps=0.0))).double()
    x = numbers(4, 7, 3, dtype=torch.float64)
    expected = outputs(model, x)
    (step,) = normswap.plan(model, "scale_norm")
    assert step.fidelity == "affine"
    assert "equal but for eps" in step.note
    torch.testing.assert_close(outputs(swap(model), x), expected, rtol=0, atol=1e-12)


def test_weight_and_bias_are_there_where_the_source_has_them() -> None:
    assert set(normswap.build("scale_norm", CHANNELS).state_dict()) == {"scale"}
    assert set(swap(SOURCES["LayerNorm"].model()).norm1.state_dict()) == {"scale", "weight", "bias"}
    assert set(swap(SOURCES["LayerNorm-plain"].model()).norm1.state_dict()) == {"scale"}
    assert set(swap(SOURCES["RMSNorm"].model()).norm1.state_dict()) == {"scale", "weight"}
    assert set(swap(batch_net(affine=False))[1].state_dict()) == {"scale", "weight", "bias"}


def test_from_running_statistics_the_expected_length_is_matched() -> None:
    model = batch_net(eps=1e-3).double()
    norm = model[1]
    root = (norm.running_var + 1e-3).sqrt()
    square = (norm.running_var + norm.running_mean**2).mean()
    weight = (norm.weight * square.sqrt() / root).detach()
    bias = (norm.bias - norm.weight * norm.running_mean / root).detach()
    assert promised(model) == "matched"
    swap(model)
    torch.testing.assert_close(model[1].weight.detach(), weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(model[1].bias.detach(), bias, rtol=1e-12, atol=1e-12)
    assert float(model[1].scale.detach()) == math.sqrt(CHANNELS)


def test_the_learned_length_stays_from_one_to_another() -> None:
    model = swap(SOURCES["RMSNorm"].model().double())
    with torch.no_grad():
        model.norm1.scale.fill_(7.25)
    before = outputs(model, model.example().double())
    assert promised(model, affine=True) == "exact"
    first = model.norm1
    assert swap(model, affine=True).norm1 is first  # it has a weight
    swap(model, eps=1e-9)
    assert model.norm1 is not first
    torch.testing.assert_close(outputs(model, model.example().double()), before)


def test_a_zero_vector_has_a_zero_output_and_a_finite_gradient() -> None:
    norm = normswap.build("scale_norm", CHANNELS)
    x = torch.zeros(2, CHANNELS, 3, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_large_values_do_not_overflow_in_half_precision() -> None:
    norm = normswap.build("scale_norm", CHANNELS).half()
    y = norm(torch.full((1, CHANNELS, 2), 6e4, dtype=torch.float16))
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_one_channel_is_refused(training: bool) -> None:
    with pytest.raises(DegeneratePooling, match="more channels"):
        normswap.build("scale_norm", 1).train(training)(torch.ones(2, 1, 4, 4))


def test_each_position_is_by_itself() -> None:
    norm = filled(normswap.build("scale_norm", CHANNELS))
    x = numbers(2, CHANNELS, 3, 3)
    assert same_bits(norm(x)[:, :, :1], norm(x[:, :, :1]))
