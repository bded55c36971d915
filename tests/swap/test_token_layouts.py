"""LayerNorms whose channels come last, as sources of every norm: (B, N, C) and (B, H, W, C)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.norms.base import Norm, rearranged, restored
from tests.swap.helpers import CHANNELS, TARGETS, MapNet, TokenNet, filled

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

SHAPES = {"tokens": (4, 7, 3), "maps": (4, 6, 5, 3)}

#: A LayerNorm has no statistics that a norm could be frozen at.
LAYER_TARGETS = [name for name in TARGETS if name != "frozen_bn"]


def net() -> Any:
    return filled(TokenNet(lambda: nn.LayerNorm(CHANNELS))).double()


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", LAYER_TARGETS)
def test_channels_last_are_channels_first_seen_otherwise(target: str, shape: str) -> None:
    model, x = net(), numbers(SHAPES[shape])
    normswap.convert(model, target, where="*", example_inputs=x)
    norm, given = model.norm1, model.linear1(x).detach()
    if not isinstance(norm, Norm):
        assert type(norm) in (nn.LayerNorm, nn.RMSNorm), "torch's own take channels last"
        return
    same = copy.deepcopy(norm)
    same.channel_dim, same.flattens = 1, shape == "maps" and not norm.spatial
    outputs = []
    for module, layout, back in ((norm, lambda t: t, lambda t: t), (same, first, last)):
        leaf = given.clone().requires_grad_()
        y = back(module(layout(leaf)))
        weights = numbers(tuple(y.shape), seed=1)
        outputs.append((y.detach(), *torch.autograd.grad((y * weights).sum(), leaf)))
        module.eval()
        outputs[-1] += (back(module(layout(given))).detach(),)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", LAYER_TARGETS)
def test_a_model_may_view_what_a_norm_makes(target: str, shape: str) -> None:
    model, x = net(), numbers(SHAPES[shape])
    normswap.convert(model, target, where="*", example_inputs=x)
    for training in (True, False):
        assert model.train(training).norm1(model.linear1(x)).view(-1, CHANNELS).isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_may_view_what_a_norm_of_maps_makes(target: str) -> None:
    model = filled(MapNet(lambda: nn.BatchNorm2d(CHANNELS))).double()
    x = model.example().double()
    normswap.convert(model, target, example_inputs=x)
    for training in (True, False):
        assert model.train(training).norm1(model.conv1(x)).view(len(x), -1).isfinite().all()


def first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


@pytest.mark.parametrize("shape", [(4, 7, CHANNELS), (4, 6, 5, CHANNELS), (2, 3, 4, 5, CHANNELS)])
@pytest.mark.parametrize("flat", [True, False])
def test_a_layout_is_a_view(shape: tuple[int, ...], flat: bool) -> None:
    x = numbers(shape)
    moved = rearranged(x, -1, 1, flat=flat)
    back = restored(moved, x, -1, 1)
    assert moved.data_ptr() == back.data_ptr() == x.data_ptr()
    assert torch.equal(back, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_norm_of_tokens_pools_over_samples_and_positions(shape: str) -> None:
    model, x = net(), numbers(SHAPES[shape])
    normswap.convert(model, "bn", where="*")
    given = model.linear1(x).detach()
    rows = given.reshape(-1, CHANNELS)
    mean, var = rows.mean(0), rows.var(0, correction=0)
    norm = model.norm1
    expected = norm.weight * (given - mean) / (var + norm.eps).sqrt() + norm.bias
    torch.testing.assert_close(norm(given), expected, rtol=1e-10, atol=1e-10)
    unbiased = 0.1 * rows.var(0) + 0.9
    torch.testing.assert_close(norm.running_var, unbiased, rtol=1e-10, atol=1e-10)


MAPS: dict[str, Any] = {
    "adacon": ({"style_dim": 4}, {"style": (4, 4)}),
    "spade": ({"num_labels": 3}, {"segmap": (4, 3)}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", MAPS)
def test_norms_with_maps_for_inputs_take_channels_last(target: str, shape: str) -> None:
    options, sizes = MAPS[target]
    x = numbers(SHAPES[shape])
    model = normswap.convert(net(), target, where="*", example_inputs=x, **options)
    positions = x.shape[1:-1] if target == "spade" else ()
    inputs = {name: numbers((*size, *positions)).abs() for name, size in sizes.items()}
    assert model(x, **inputs).shape == (*x.shape[:-1], CHANNELS)
    norm, given = model.norm1, model.linear1(x).detach()
    with torch.no_grad():  # so that what is predicted differs from place to place
        for number, parameter in enumerate(norm.parameters()):
            parameter += 0.3 * numbers(tuple(parameter.shape), seed=number)
    same = copy.deepcopy(norm)
    same.channel_dim = 1
    with normswap.given(norm, **inputs):
        y = norm(given)
    with normswap.given(same, **inputs):
        torch.testing.assert_close(y, last(same(first(given))), rtol=1e-10, atol=1e-10)
