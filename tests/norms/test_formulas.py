"""Every built norm follows its paper's formula, in 1, 2 and 3 dimensions and in none."""

from __future__ import annotations

import pytest
import torch

from normswap import build
from tests.norms.cases import (
    CASES,
    CHANNELS,
    FROZEN,
    IDENTITY,
    SINGLE,
    Case,
    affine,
    own,
    statistics,
)
from tests.reference import formulas
from tests.reference.data import close, values
from tests.reference.formulas import Running

SHAPES = [(4, CHANNELS), (4, CHANNELS, 5), (4, CHANNELS, 3, 2), (4, CHANNELS, 2, 3, 2)]
PAIRS = [
    pytest.param(case, shape, id=f"{case}-{len(shape) - 2}d")
    for case in CASES
    for shape in SHAPES
    # Without positions there is a single value per sample and channel.
    if not (case in SINGLE and len(shape) == 2)
]
UPDATING = [pair for pair in PAIRS if pair.values[0].updates]
LEARNING = [pair for pair in PAIRS if own(pair.values[0].build(pair.values[1]))]
TRAINABLE = [pair for pair in PAIRS if pair.values[0] not in (FROZEN, IDENTITY)]


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_the_train_output_is_the_formulas(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = case.build(shape), values(*shape)
    close(norm(x), case.train(x, *affine(norm), statistics(), **own(norm)))


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_the_eval_output_is_the_formulas(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = case.build(shape).eval(), values(*shape)
    close(norm(x), case.eval(x, *affine(norm), statistics(), **own(norm)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_the_inputs_gradient_is_the_formulas(case: Case, shape: tuple[int, ...], mode: str) -> None:
    norm, direction = case.build(shape).train(mode == "train"), values(*shape, seed=1)
    x, expected = values(*shape).requires_grad_(), values(*shape).requires_grad_()
    formula = case.train if mode == "train" else case.eval
    norm(x).backward(direction)
    formula(expected, *affine(norm), statistics(), **own(norm)).backward(direction)
    close(x.grad, expected.grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("case", "shape"), TRAINABLE)
def test_the_gradients_of_weight_and_bias_are_the_formulas(
    case: Case, shape: tuple[int, ...], mode: str
) -> None:
    norm, x = case.build(shape).train(mode == "train"), values(*shape)
    direction = values(*shape, seed=1)
    weight, bias = affine(norm)
    formula = case.train if mode == "train" else case.eval
    norm(x).backward(direction)
    formula(x, weight, bias, statistics(), **own(norm)).backward(direction)
    close(norm.weight.grad, weight.grad)
    close(norm.bias.grad, bias.grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("case", "shape"), LEARNING)
def test_the_gradients_of_what_else_is_learned_are_the_formulas(
    case: Case, shape: tuple[int, ...], mode: str
) -> None:
    norm, x = case.build(shape).train(mode == "train"), values(*shape)
    direction, learned = values(*shape, seed=1), own(norm)
    formula = case.train if mode == "train" else case.eval
    norm(x).backward(direction)
    formula(x, *affine(norm), statistics(), **learned).backward(direction)
    assert learned
    for name, tensor in learned.items():
        close(norm.get_parameter(name).grad, tensor.grad)


@pytest.mark.parametrize(("case", "shape"), UPDATING)
def test_three_train_steps_leave_the_formulas_statistics(
    case: Case, shape: tuple[int, ...]
) -> None:
    norm, expected = case.build(shape), statistics()
    for step in range(3):
        x = values(*shape, seed=20 + step)
        norm(x)
        case.train(x, *affine(norm), expected, **own(norm))
    close(norm.running_mean, expected.mean)
    close(norm.running_var, expected.var)


@pytest.mark.parametrize(("case", "shape"), UPDATING)
def test_eval_leaves_the_statistics(case: Case, shape: tuple[int, ...]) -> None:
    norm = case.build(shape).eval()
    norm(values(*shape))
    assert torch.equal(norm.running_mean, statistics().mean)
    assert torch.equal(norm.running_var, statistics().var)


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "sn"])
def test_every_train_step_is_counted(norm: str) -> None:
    module = build(norm, CHANNELS)
    for step in range(3):
        module(values(2, CHANNELS, 3, 3, seed=step).float())
    assert module.num_batches_tracked == 3


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_momentum_weighs_the_newest_batch(norm: str) -> None:
    module, expected = build(norm, CHANNELS, momentum=0.3).double(), Running.fresh(CHANNELS)
    for step in range(2):
        x = values(3, CHANNELS, 2, 2, seed=step)
        module(x)
        mean, var = formulas.mean_and_unbiased_var(x)
        expected.update(mean, var, 0.3)
    close(module.running_mean, expected.mean)
    close(module.running_var, expected.var)


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_without_momentum_the_statistics_are_the_plain_average(norm: str) -> None:
    module = build(norm, CHANNELS).double()
    module.momentum = None
    batches = [values(3, CHANNELS, 2, 2, seed=step) for step in range(3)]
    for x in batches:
        module(x)
    means, variances = zip(*map(formulas.mean_and_unbiased_var, batches), strict=True)
    close(module.running_mean, torch.stack(means).mean(0))
    close(module.running_var, torch.stack(variances).mean(0))


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "frozen_bn", "gn", "in", "ln", "rms"])
def test_eps_stands_inside_the_root(norm: str) -> None:
    eps = 0.5
    module = build(norm, 1, eps=eps).double().eval()
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    close(module(x), x / (1 + eps) ** 0.5)


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "gn", "in", "ln", "ln2d", "rms", "rms2d"])
def test_without_affine_there_are_no_parameters(norm: str) -> None:
    assert not list(build(norm, CHANNELS, affine=False).parameters())
