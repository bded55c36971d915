"""Power normalization beyond its formula: its starts, what it keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling, OptionError
from tests.norms.beyond import CHANNELS, buffers_of, equal
from tests.norms.test_tracked import far, network
from tests.reference.data import close, fill, values

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


@pytest.mark.parametrize("source", [{}, {"affine": False}, {"eps": 1e-3, "momentum": None}])
@pytest.mark.parametrize("eps", [{}, {"eps": 1e-4}])
def test_without_scaled_positions_a_whole_network_evaluates_as_before(
    source: dict[str, Any], eps: dict[str, float]
) -> None:
    model, x = network(**source), values(4, 3, 9, 9, seed=99).float()
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    asked: dict[str, Any] = {"where": "kind:batch_norm", "group_scale": False, **eps}
    plan = normswap.plan(model, "power_norm", **asked)
    promise = "matched" if eps else "eval"
    assert {str(step.fidelity) for step in plan.of("convert")} == {promise}
    normswap.convert(model, "power_norm", **asked)
    assert far(model(x), expected) < 1e-6
    assert model[1].num_batches_tracked == model[1].warmup
    normswap.convert(model, "bn", where="kind:power_norm")
    assert isinstance(model[1], nn.BatchNorm2d)
    assert far(model(x), expected) < 1e-6
    normswap.revert(model)
    assert equal(dict(model.state_dict()), state)


def test_with_scaled_positions_it_is_matched_and_near_where_the_positions_are_alike() -> None:
    model = fill(nn.Sequential(nn.BatchNorm2d(64)))
    model[0].running_mean.copy_(values(64, seed=1))
    model[0].running_var.copy_(values(64, seed=2).abs() + 0.3)
    x = values(4, 64, 9, 9, seed=3) - 0.5
    x = x / 1.5 * model[0].running_var.sqrt()[:, None, None] + model[0].running_mean[:, None, None]
    expected = model.eval()(x)
    (step,) = normswap.plan(model, "power_norm", where="*")
    assert step.fidelity == "matched"
    errors = {}
    for carry in ("auto", "copy"):
        with normswap.converted(model, "power_norm", where="*", carry=carry):
            errors[carry] = far(model(x), expected)
    assert errors["auto"] < 0.25 < errors["copy"]


def test_on_positions_of_one_length_the_match_is_exact() -> None:
    """Every position has the expected mean square, so that the two roots are the expected ones."""
    model = fill(nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    model[0].running_mean.copy_(values(CHANNELS, seed=1))
    model[0].running_var.copy_(values(CHANNELS, seed=2).abs() + 0.3)
    square = (model[0].running_var + model[0].running_mean.square()).mean()
    x = values(4, CHANNELS, 5, 5)
    x = x / x.square().mean(1, keepdim=True).sqrt() * square.sqrt()
    expected = model.eval()(x)
    close(normswap.convert(model, "power_norm", where="*")(x), expected)


def test_from_an_rms_norm_it_evaluates_nearly_as_that() -> None:
    model = fill(nn.Sequential(nn.Linear(3, CHANNELS), nn.RMSNorm(CHANNELS, eps=1e-5)))
    x = values(4, 7, 3)
    expected = model(x)
    (step,) = normswap.plan(model, "power_norm")
    assert step.fidelity == "affine"
    normswap.convert(model, "power_norm").eval()
    assert far(model(x), expected) < 1e-4


@pytest.mark.parametrize("momentum", [0.3, None])
def test_after_the_warm_up_the_mean_square_follows_by_momentum(momentum: float | None) -> None:
    norm = normswap.build("power_norm", CHANNELS, warmup=0, group_scale=False).double()
    norm.momentum = momentum
    expected = torch.ones(CHANNELS).double()
    for step in range(3):
        x = values(4, CHANNELS, 3, 2, seed=step)
        norm(x)
        share = 1 / (step + 1) if momentum is None else momentum
        expected = (1 - share) * expected + share * x.square().mean((0, 2, 3))
    close(norm.running_square, expected)


def test_the_gradient_divides_by_the_batch_whatever_the_forward_divides_by() -> None:
    norm = normswap.build("power_norm", CHANNELS, warmup=0, group_scale=False, affine=False)
    norm.double()
    x = values(4, CHANNELS, 3, 2).requires_grad_()
    y = norm(x)
    close(y, x / (1 + 1e-5) ** 0.5)
    dy = values(4, CHANNELS, 3, 2, seed=1)
    y.backward(dy)
    square = x.detach().square().mean((0, 2, 3), keepdim=True)
    close(x.grad, dy / (square + 1e-5).sqrt())
    close(norm.running_slope, (dy * y.detach()).mean((0, 2, 3)))


def test_an_empty_batch_leaves_what_is_kept() -> None:
    norm = normswap.build("power_norm", CHANNELS)
    before = buffers_of(norm)
    x = torch.zeros(0, CHANNELS, 3, 3, requires_grad=True)
    norm(x).sum().backward()
    assert equal(buffers_of(norm), before)


def test_derivatives_of_second_order_are_refused() -> None:
    norm, x = normswap.build("power_norm", CHANNELS).double(), values(4, CHANNELS).requires_grad_()
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_is_degenerate_is_refused() -> None:
    with pytest.raises(DegeneratePooling, match="group_scale"):
        normswap.build("power_norm", 1)(torch.ones(2, 1, 3, 3))
    norm = normswap.build("power_norm", CHANNELS)
    with pytest.raises(DegeneratePooling, match="larger batch"):
        norm(torch.ones(1, CHANNELS, 1, 1))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.ones(1, CHANNELS, 1, 1)).isfinite().all()


@pytest.mark.parametrize("options", [{"warmup": -1}, {"warmup": True}, {"group_scale": 1}])
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.spec("power_norm", **options)
