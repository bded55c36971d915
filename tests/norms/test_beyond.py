"""Every norm beyond the arithmetic of moments follows its paper's formula, in all that it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.norms.beyond import (
    BEYOND,
    CHANNELS,
    Beyond,
    buffers_of,
    equal,
    parameters_of,
)
from tests.reference.data import close, values

PAIRS = [
    pytest.param(case, shape, id=f"{case}-{len(shape) - 2}d")
    for case in BEYOND
    for shape in case.shapes
]
each_case = pytest.mark.parametrize("case", BEYOND, ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


SEED = 5


def seeded(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm or its formula, with the same draws in training whenever it is called."""

    def called(*args: Any) -> Tensor:
        torch.default_generator.manual_seed(SEED)
        return call(*args)

    return called


def gradients(y: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a sum that weighs every output differently."""
    wanted = {"x": x, **parameters}
    found = torch.autograd.grad(y, list(wanted.values()), values(*y.shape, seed=1))
    return dict(zip(wanted, found, strict=True))


@each_mode
@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_output_and_every_gradient_are_the_formulas(
    case: Beyond, shape: tuple[int, ...], training: bool
) -> None:
    norm = case.build(max(len(shape) - 2, 1)).train(training)
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    x, other = values(*shape).requires_grad_(), values(*shape).requires_grad_()
    y, expected = seeded(norm)(x), seeded(case.formula)(other, parameters, buffers, training)
    close(y, expected)
    found = gradients(y, x, dict(norm.named_parameters()))
    for name, gradient in gradients(expected, other, parameters).items():
        close(found[name], gradient)


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_three_train_steps_leave_what_the_formula_keeps(
    case: Beyond, shape: tuple[int, ...]
) -> None:
    norm = case.build(max(len(shape) - 2, 1))
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    for step in range(3):
        x, other = (values(*shape, seed=20 + step).requires_grad_() for _ in range(2))
        y, expected = seeded(norm)(x), seeded(case.formula)(other, parameters, buffers, True)
        close(y, expected)
        y.backward(values(*shape, seed=30 + step))
        expected.backward(values(*shape, seed=30 + step))
    for name, buffer in norm.named_buffers():
        close(buffer, buffers[name])


@each_case
def test_eval_leaves_what_is_kept(case: Beyond) -> None:
    norm = case.build().eval()
    before = buffers_of(norm)
    norm(values(4, CHANNELS, 3, 4).requires_grad_()).sum().backward()
    assert equal(buffers_of(norm), before)


@each_mode
@each_case
def test_tokens_give_what_moving_the_axes_gives(case: Beyond, training: bool) -> None:
    norm = case.on_tokens().train(training)
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    x, other = values(3, 5, CHANNELS).requires_grad_(), values(3, 5, CHANNELS).requires_grad_()
    moved = seeded(case.formula)(other.movedim(-1, 1), parameters, buffers, training)
    y, expected = seeded(norm)(x), moved.movedim(1, -1)
    close(y, expected)
    close(gradients(y, x, {})["x"], gradients(expected, other, {})["x"])


@each_mode
@pytest.mark.parametrize("case", [case for case in BEYOND if case.autograd], ids=str)
def test_numerical_gradients(case: Beyond, training: bool) -> None:
    norm = case.build().train(training)
    names, buffers = [name for name, _ in norm.named_parameters()], buffers_of(norm)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        torch.default_generator.manual_seed(SEED)
        return torch.func.functional_call(norm, given | kept, (x,))

    inputs = [values(2, CHANNELS, 2, 3), *(p.detach().clone() for p in norm.parameters())]
    assert torch.autograd.gradcheck(run, [each.requires_grad_() for each in inputs])


@each_mode
@each_case
def test_half_precision_is_computed_in_single(case: Beyond, training: bool) -> None:
    norm = case.build().float().train(training)
    x = values(4, CHANNELS, 3, 4).bfloat16()
    expected = seeded(copy.deepcopy(norm))(x.float())
    y = seeded(norm)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)


@each_mode
@each_case
def test_autocast_changes_nothing(case: Beyond, training: bool) -> None:
    norm = case.build().float().train(training)
    x = values(4, CHANNELS, 3, 4).float()
    expected = seeded(copy.deepcopy(norm))(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = seeded(norm)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@each_case
def test_a_copy_is_independent(case: Beyond) -> None:
    norm = case.build()
    before, other = {**parameters_of(norm), **buffers_of(norm)}, copy.deepcopy(norm)
    x = values(4, CHANNELS, 3, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    seeded(other)(x).square().sum().backward()
    optimizer.step()
    assert equal({**parameters_of(norm), **buffers_of(norm)}, before)
    close(seeded(case.build())(x), seeded(norm)(x))


@each_case
def test_a_state_dict_brings_everything(case: Beyond) -> None:
    norm, other = case.build(), case.build()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            tensor.add_(1)
    other.load_state_dict(norm.state_dict())
    x = values(4, CHANNELS, 3, 4)
    close(seeded(other.eval())(x), seeded(norm.eval())(x))


@each_mode
@each_case
def test_compiles_in_one_graph(case: Beyond, training: bool) -> None:
    torch.compiler.reset()
    norm = case.build().train(training)
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x, like = (values(4, CHANNELS, 3, 4, seed=seed).requires_grad_() for _ in range(2))
        y, expected = seeded(compiled)(x), seeded(norm)(like)
        close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        close(x.grad, like.grad)
    for name, buffer in norm.named_buffers():
        close(other.get_buffer(name), buffer)


@each_case
def test_it_says_what_it_is(case: Beyond) -> None:
    norm: nn.Module = case.build()
    assert f"{CHANNELS}" in repr(norm)


@each_mode
@pytest.mark.parametrize("affine", [True, False])
@each_case
def test_what_it_returns_may_be_overwritten(case: Beyond, affine: bool, training: bool) -> None:
    """As an activation in place does."""
    norm = case.build().train(training)
    if not affine:
        norm.weight = norm.bias = None
    grads = []
    for act in (torch.nn.functional.relu, torch.nn.functional.relu_):
        x = values(4, CHANNELS, 3, 4).requires_grad_()
        act(seeded(copy.deepcopy(norm))(x)).backward(values(4, CHANNELS, 3, 4, seed=1))
        grads.append(x.grad)
    close(*grads)
