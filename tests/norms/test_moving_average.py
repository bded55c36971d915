"""Moving average batch normalization: late steps, what backward keeps, and how it starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import OptionError
from tests.norms.beyond import CHANNELS, buffers_of, equal, parameters_of, set_buffers
from tests.reference import beyond
from tests.reference.data import close, fill, values

RECENT = {"buffer_size": 2, "warmup": 0}
SHAPE = (4, CHANNELS, 3, 2)


def made(**options: Any) -> Any:
    """A norm of two slots that has no warm-up, in which all numbers differ."""
    return set_buffers(fill(normswap.build("mabn", CHANNELS, **{**RECENT, **options})))


@pytest.mark.parametrize("spread", [1.0, 30.0, 0.03])
@pytest.mark.parametrize("first", [0, 998, 2000])
def test_five_steps_from_any_step_on_are_the_formulas(first: int, spread: float) -> None:
    norm, formula = made(), beyond.moving_average_batch_norm(2, 0)
    norm.steps.fill_(first)
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    for step in range(5):
        x, other = ((values(*SHAPE, seed=step) * spread).requires_grad_() for _ in range(2))
        y, expected = norm(x), formula(other, parameters, buffers, True)
        close(y, expected)
        for each in (y, expected):
            each.backward(values(*SHAPE, seed=50 + step))
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-10)
    for name, parameter in norm.named_parameters():
        close(parameter.grad, parameters[name].grad)
    for name, kept in norm.named_buffers():
        close(kept, buffers[name])


def test_a_compiled_step_after_a_thousand_is_the_same() -> None:
    torch.compiler.reset()
    norm = made()
    norm.steps.fill_(2000)
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x, like = (values(*SHAPE, seed=step).requires_grad_() for _ in range(2))
        for call, given in ((norm, x), (compiled, like)):
            call(given).backward(values(*SHAPE, seed=50 + step))
        close(x.grad, like.grad)
    for name, kept in norm.named_buffers():
        close(kept, other.get_buffer(name))


def test_while_the_batch_is_taken_alone_the_gradient_is_exact() -> None:
    norm = normswap.build("mabn", CHANNELS).double()
    x, other = values(*SHAPE).requires_grad_(), values(*SHAPE).requires_grad_()
    norm(x).backward(values(*SHAPE, seed=1))
    z = other / (other.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    z.backward(values(*SHAPE, seed=1))
    close(x.grad, other.grad)


def test_a_second_backward_writes_over_what_the_first_has_kept() -> None:
    norm, x = made(), values(*SHAPE).requires_grad_()
    y = norm(x)
    y.backward(values(*SHAPE, seed=1), retain_graph=True)
    kept = norm.recent_products.clone()
    y.backward(3 * values(*SHAPE, seed=1))
    close(norm.recent_products[1], 3 * kept[1])
    close(norm.recent_products[0], kept[0])


def test_two_forwards_may_wait_for_their_backwards() -> None:
    norm = made()
    first, second = (norm(values(*SHAPE, seed=seed).requires_grad_()) for seed in (0, 1))
    before = norm.recent_products.clone()
    second.sum().backward()
    assert torch.equal(norm.recent_products[1], before[1])
    first.sum().backward()
    assert not (norm.recent_products == before).any()


def test_derivatives_of_second_order_are_refused() -> None:
    norm, x = made(), values(*SHAPE).requires_grad_()
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("options", [{}, {"eps": 1e-2}])
def test_it_evaluates_as_the_batch_norm_that_it_replaces(options: dict[str, Any]) -> None:
    model = fill(nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=None))).eval()
    set_buffers(model)
    x, count = values(*SHAPE), model[0].num_batches_tracked.fill_(7).clone()
    expected = model(x)
    normswap.convert(model, "mabn", **options)
    close(model(x), expected)
    assert model[0].num_batches_tracked == count
    assert model[0].steps == 0
    normswap.convert(model, "bn", where="kind:batch_norm")
    assert isinstance(model[0], nn.BatchNorm2d)
    close(model(x), expected)
    assert model[0].num_batches_tracked == count


def test_the_plan_tells_of_means_that_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    (step,) = normswap.plan(model, "mabn")
    assert "mean" not in step.note
    model[0].running_mean[2] = -3.0
    (step,) = normswap.plan(model, "mabn")
    assert "up to 3.0 standard deviations from zero" in step.note


def test_a_statistics_pass_does_not_count_as_training() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), normswap.build("mabn", CHANNELS))
    before = buffers_of(model[1])
    report = normswap.warmup(model, [values(*SHAPE).float()], progress=False)
    assert "only training updates it" in str(report)
    assert equal(buffers_of(model[1]), before)


@pytest.mark.parametrize("options", [{"buffer_size": 0}, {"buffer_size": True}, {"warmup": -1}])
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.spec("mabn", **options)
