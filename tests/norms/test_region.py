"""Learned region normalization beyond its formula: its start, its regions, and what it refuses."""

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


def made(**options: Any) -> Any:
    return normswap.build("rn_l", CHANNELS, **options).double()


def test_before_it_learns_regions_it_is_a_batch_norm_in_training() -> None:
    norm, x = made(), values(4, CHANNELS, 5, 5)
    close(norm(x), nn.BatchNorm2d(CHANNELS).double()(x))
    close(norm.eval()(x), norm.train()(x))


def test_everything_learns_from_the_second_step_on() -> None:
    norm = made()
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        norm(values(4, CHANNELS, 5, 5)).backward(values(4, CHANNELS, 5, 5, seed=step))
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in norm.parameters())


def test_of_each_sample_it_is_an_instance_norm() -> None:
    norm, x = made(per_sample=True), values(4, CHANNELS, 5, 5)
    close(norm(x), nn.InstanceNorm2d(CHANNELS).double()(x))


def test_from_a_batch_norm_gain_and_offset_are_carried() -> None:
    model = fill(nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = values(4, CHANNELS, 5, 5)
    expected = model(x)
    (step,) = normswap.plan(model, "rn_l")
    assert step.fidelity == "matched"
    normswap.convert(model, "rn_l")
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].bias, bias)
    close(model(x), expected)


def test_no_gradient_goes_through_the_threshold() -> None:
    norm = fill(made())
    for name in ("gain_weight", "offset_weight"):
        nn.init.zeros_(getattr(norm, name))
    norm(values(4, CHANNELS, 5, 5)).backward(values(4, CHANNELS, 5, 5, seed=1))
    assert (norm.region_weight.grad == 0).all()


def split() -> tuple[Any, torch.Tensor]:
    """A norm that deems positive maps holes, and an input of both."""
    norm = made(threshold=0.5)
    with torch.no_grad():
        norm.region_weight[:, 0, 3, 3] = 1.0
    x = values(2, CHANNELS, 6, 6)
    x[..., :3] += 10
    x[..., 3:] -= 10
    return norm, x


def test_regions_are_standardized_apart() -> None:
    norm, x = split()
    y = norm(x)
    for part in (y[..., :3], y[..., 3:]):
        torch.testing.assert_close(
            part.mean((0, 2, 3)), torch.zeros(CHANNELS).double(), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(
            part.var((0, 2, 3), correction=0), torch.ones(CHANNELS).double(), rtol=1e-4, atol=0
        )


def test_what_one_region_holds_does_not_reach_the_other() -> None:
    norm, x = split()
    other = x.clone()
    other[..., :3] *= 2
    close(norm(x)[..., 3:], norm(other)[..., 3:])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_channels_may_come_last(dim: int) -> None:
    state = replace(fresh_state(CHANNELS, dim=dim), channel_dim=-1)
    start = normswap.spec("rn_l").start(state)
    norm, last = fill(normswap.build("rn_l", CHANNELS, dim=dim)), fill(furnish(state, start).module)
    x = values(2, CHANNELS, *(5, 4, 3)[:dim])
    close(last(x.movedim(1, -1)), norm(x).movedim(1, -1))


def test_vectors_have_one_position() -> None:
    norm = fill(normswap.build("rn_l", CHANNELS, dim=1))
    x = values(5, CHANNELS)
    close(norm(x), norm(x[..., None])[..., 0])


def test_where_nothing_tells_the_dimension_the_site_is_skipped() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS))
    steps = normswap.plan(model, "rn_l")
    assert [step.action for step in steps] == ["skip", "convert"]
    assert "give example_inputs" in steps[0].reason


@pytest.mark.parametrize(
    ("options", "shape"), [({}, (1, CHANNELS, 1, 1)), ({"per_sample": True}, (4, CHANNELS, 1, 1))]
)
def test_a_single_value_is_refused(options: dict[str, bool], shape: tuple[int, ...]) -> None:
    with pytest.raises(DegeneratePooling, match="larger"):
        made(**options)(torch.ones(shape).double())


@pytest.mark.parametrize("options", [{"threshold": 2.0}, {"per_sample": 1}, {"eps_scaled": "no"}])
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.spec("rn_l", **options)


def test_regions_of_each_sample_are_not_synchronised() -> None:
    with pytest.raises(OptionError, match="one rank"):
        normswap.build("rn_l", CHANNELS, per_sample=True, sync=True)


def test_an_empty_batch_is_let_through() -> None:
    x = torch.zeros(0, CHANNELS, 3, 3).double().requires_grad_()
    made()(x).sum().backward()
    assert x.grad is not None
