"""Attentive normalization beyond its formula: its start, its draws and its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import OptionError
from tests.norms.beyond import CHANNELS, equal
from tests.norms.test_tracked import far, network
from tests.reference.data import close, fill, values


def made(**options: Any) -> Any:
    norm = fill(normswap.build("an_wang", CHANNELS, **options))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(0.5)
    return norm


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-3}])
def test_a_whole_network_evaluates_as_before(options: dict[str, Any]) -> None:
    model, x = network(**options), values(4, 3, 9, 9, seed=99).float()
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = normswap.plan(model, "an_wang", min_fidelity="eval")
    assert {str(step.fidelity) for step in plan.of("convert")} == {"eval"}
    normswap.convert(model, "an_wang")
    assert far(model(x), expected) < 1e-6
    assert far(model.train()(x), expected) < 1e-6
    normswap.revert(model.eval())
    assert equal(dict(model.state_dict()), state)


def test_a_conversion_is_the_same_at_every_run_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    one, other = (normswap.convert(network(), "an_wang") for _ in range(2))
    torch.default_generator.manual_seed(0)
    normswap.build("an_wang", CHANNELS)
    torch.default_generator.manual_seed(0)
    before = torch.get_rng_state()
    normswap.build("an_wang", CHANNELS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert equal(dict(one.state_dict()), dict(other.state_dict()))


def test_at_first_only_what_is_added_and_the_affine_learn() -> None:
    norm = normswap.build("an_wang", CHANNELS).double()
    norm(values(4, CHANNELS, 5, 5)).backward(values(4, CHANNELS, 5, 5, seed=1))
    moved = {n for n, p in norm.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"weight", "bias", "residual"}


def test_eval_draws_nothing_and_training_draws_anew() -> None:
    norm, x = made(), values(2, CHANNELS, 5, 5)
    assert not torch.equal(norm(x), norm(x))
    norm.eval()
    assert torch.equal(norm(x), norm(x))


def test_places_in_eval_mode_are_evenly_spaced() -> None:
    norm = made(num_regions=4).eval()
    assert norm._places(16, torch.device("cpu")).tolist() == [2, 6, 10, 14]
    assert norm._places(2, torch.device("cpu")).tolist() == [0, 0, 1, 1]


def test_samples_do_not_meet() -> None:
    norm, x = made().eval(), values(3, CHANNELS, 5, 5)
    close(norm(x)[:1], norm(x[:1]))


def test_a_single_position_has_nothing_to_add() -> None:
    norm, x = made().float(), values(4, CHANNELS).float()
    expected = x * norm.weight + norm.bias
    y = norm(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_orthonormal_maps_cost_nothing() -> None:
    norm = made(num_regions=3)
    with torch.no_grad():
        norm.share_weight.copy_(torch.eye(CHANNELS)[:3])
        assert norm.orthogonality() == 0
        norm.share_weight[0] *= 2
        assert norm.orthogonality() == 9
        norm.share_weight[1] = norm.share_weight[2]
        assert norm.orthogonality() == 9 + 2


def test_once_it_adds_it_is_no_mere_affine() -> None:
    model = normswap.convert(network(), "an_wang")
    with torch.no_grad():
        model[1].residual.fill_(0.5)
    rules = [site.state.rule for site in normswap.find(model)]
    assert rules[0] != rules[1]


@pytest.mark.parametrize("options", [{"num_regions": 0}, {"num_regions": True}, {"official": 1}])
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.spec("an_wang", **options)


def test_fewer_than_eight_channels_have_one_row_of_keys() -> None:
    assert normswap.build("an_wang", 5).key_weight.shape == (1, 5)
    assert normswap.build("an_wang", 32).key_weight.shape == (4, 32)
    assert isinstance(normswap.build("an_wang", 8).residual, nn.Parameter)
