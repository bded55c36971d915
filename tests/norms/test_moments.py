"""The passes that norms are made of: every dtype, layout, number of dimensions and size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.norms.measured import pooled
from normswap.norms.moments import Rule, normalized
from normswap.norms.passes import moments
from tests.reference.data import close, values

# One for each way that the passes go: few, some and many positions, few and many channels, small
# and large samples; all numbers of dimensions; single samples, channels and positions; none.
SHAPES = [
    (4, 6),
    (3, 1, 1, 1),
    (1, 6, 1, 1),
    (3, 4, 5),
    (1, 1, 7),
    (3, 4, 30),
    (3, 5, 6, 7),
    (2, 3, 25, 24),
    (2, 3, 3, 4, 5),
    (2, 70, 16, 16),
    (2, 40, 9, 8, 6),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
    (0, 3),
]
LAYOUTS = ["contiguous", "channels last", "strided"]
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, lying otherwise in memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.repeat_interleave(2, dim=0)[::2] if layout == "strided" else x.contiguous()


def mixing(weight: Tensor, bias: Tensor) -> Rule:
    """A rule in which everything depends on everything."""

    def rule(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        sample_mean, sample_var = pooled(mean, var, 1)
        batch_mean, batch_var = pooled(mean, var, 0)
        centre = 0.2 * mean + 0.3 * sample_mean + 0.5 * batch_mean
        spread = 0.4 * var + 0.5 * sample_var + 0.1 * batch_var
        gain = weight * (spread + 1e-2).rsqrt()
        return gain, bias - gain * centre

    return rule


def textbook(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `mixing` comes to, written over the input's own dimensions, without pooling twice."""
    flat = x.unsqueeze(2) if x.ndim == 2 else x.flatten(2)

    def stats(*dims: int) -> tuple[Tensor, Tensor]:
        count = max(math.prod(flat.shape[dim] for dim in dims), 1)
        mean = flat.sum(dims, keepdim=True) / count
        return mean, ((flat - mean) ** 2).sum(dims, keepdim=True) / count

    own, sample, batch = stats(2), stats(1, 2), stats(0, 2)
    centre = 0.2 * own[0] + 0.3 * sample[0] + 0.5 * batch[0]
    spread = 0.4 * own[1] + 0.5 * sample[1] + 0.1 * batch[1]
    y = (flat - centre) / (spread + 1e-2).sqrt() * weight[:, None] + bias[:, None]
    return y.reshape(x.shape)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert agreement to a fraction of the largest value, which is what rounding is of."""
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=SLACK[dtype] * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    work = torch.promote_types(dtype, torch.float32)
    data, direction = values(*shape).to(dtype), values(*shape, seed=1).to(dtype)
    x = laid_out(data, layout).requires_grad_()
    parameters = [values(shape[1], seed=seed).to(work).requires_grad_() for seed in (2, 3)]
    y = normalized(x, mixing(*parameters))
    assert y.dtype == dtype
    y.backward(laid_out(direction, "channels last"))

    exact = data.detach().clone().double().requires_grad_()
    theirs = [each.detach().double().requires_grad_() for each in parameters]
    expected = textbook(exact, *theirs)
    expected.backward(direction.double())
    near(y.detach(), expected.detach(), dtype)
    assert x.grad.dtype == dtype
    near(x.grad, exact.grad, dtype)
    for mine, other in zip(parameters, theirs, strict=True):
        near(mine.grad, other.grad, work)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_the_memory_format_stays(shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(values(*shape), layout).requires_grad_()
    y = normalized(x, mixing(values(shape[1]), values(shape[1])))
    y.sum().backward()  # of a gradient that lies nowhere: its strides are zero
    assert y.stride() == x.stride()
    assert x.grad.stride() == x.stride()


CHECKED = [(3, 2), (2, 3, 4), (2, 2, 3, 7), (2, 2, 2, 3, 3)]


@pytest.mark.parametrize("takes", ["all", "input", "parameters"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", CHECKED, ids=str)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check: Any, shape: tuple[int, ...], layout: str, takes: str) -> None:
    x, weight, bias = laid_out(values(*shape), layout), values(shape[1]), values(shape[1], seed=5)
    x.requires_grad_(takes != "parameters")
    weight.requires_grad_(takes != "input"), bias.requires_grad_(takes != "input")
    assert check(lambda x, w, b: normalized(x, mixing(w, b)), (x, weight, bias))


def test_numerical_gradients_of_many_positions() -> None:
    x = values(1, 2, 20, 21).requires_grad_()
    weight, bias = values(2).requires_grad_(), values(2, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: normalized(x, mixing(w, b)), (x, weight, bias))


def test_third_derivatives_follow_the_formula() -> None:
    weight, bias = values(3), values(3, seed=5)

    def thrice(norm: Callable[[Tensor], Tensor]) -> Tensor:
        x = values(2, 3, 4, 5).requires_grad_()
        (first,) = torch.autograd.grad((norm(x) * x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * x).sin().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad((second * x).sum() + norm(x).square().sum(), x)
        return third

    got = thrice(lambda x: normalized(x, mixing(weight, bias)))
    near(got, thrice(lambda x: textbook(x, weight, bias)), torch.float64)


def test_a_graph_that_is_kept_may_be_gone_through_again_and_in_parts() -> None:
    x = values(2, 3, 4, 5).requires_grad_()
    weight, bias = (values(3, seed=seed).requires_grad_() for seed in (5, 6))
    y = normalized(x, mixing(weight, bias))
    exact = textbook(x, weight, bias)
    for seed, wanted in enumerate([[weight], [x], [bias, x], [x, weight]]):
        direction = values(*x.shape, seed=10 + seed)
        got = torch.autograd.grad(y, wanted, direction, retain_graph=True)
        expected = torch.autograd.grad(exact, wanted, direction, retain_graph=True)
        for mine, theirs in zip(got, expected, strict=True):
            near(mine, theirs, torch.float64)


@pytest.mark.parametrize("positions", [20, 200, 3136])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mean", "deviation", "within"),
    [(1e3, 1e-2, 1e-5), (-1.0, 1e-4, 1e-5), (90, 1, 4e-6), (9, 1, 4e-6), (0.0, 1e-12, 1e-5)],
)
def test_a_large_mean_does_not_spoil_the_variance(
    mean: float, deviation: float, within: float, layout: str, positions: int
) -> None:
    x = laid_out((mean + deviation * values(16, 64, positions)).float(), layout)
    got_mean, got_var = moments(x)
    exact = x.double()
    torch.testing.assert_close(got_mean.double(), exact.mean(2), rtol=1e-6, atol=1e-7 * deviation)
    torch.testing.assert_close(got_var.double(), exact.var(2, correction=0), rtol=within, atol=0)


def rectified(x: Tensor) -> Tensor:
    """Half of all values are one and the same, which rounds each step of a sum the same way."""
    return x.relu()


def with_an_outlier(x: Tensor) -> Tensor:
    """In the middle, where a value is taken to tell what the others are."""
    x[..., x.shape[-1] // 2] = 40.0
    return x


@pytest.mark.parametrize("positions", [16, 49, 529, 784, 3136, 12544, 2 * 6277])
@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0, -1.8, 2.2])
@pytest.mark.parametrize("made", [torch.sin, rectified, with_an_outlier])
def test_variances_are_precise_whatever_the_values_are_like(
    made: Callable[[Tensor], Tensor], mean: float, positions: int
) -> None:
    x = made(values(4, 64, positions)) + mean
    got_mean, got_var = moments(x.float())
    exact = x.float().double()
    var = exact.var(2, correction=0)
    torch.testing.assert_close(got_var.double(), var, rtol=3e-6, atol=0)
    off = (got_mean.double() - exact.mean(2)).abs() / var.sqrt()
    assert off.max() < 2e-6


@pytest.mark.parametrize("far", [1, 3, 40, 64])
def test_some_rows_may_be_far_from_zero_among_others(far: int) -> None:
    x = values(1, 64, 200)
    x[:, :far] += torch.linspace(3, 300, far).view(1, far, 1)
    mean, var = moments(x.float())
    exact = x.float().double()
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(var.double(), exact.var(2, correction=0), rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("positions", [1, 20, 500])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_a_constant_has_hardly_any_variance(
    value: float, layout: str, positions: int, dtype: torch.dtype
) -> None:
    x = laid_out(torch.full((2, 3, positions), value, dtype=dtype), layout)
    mean, var = moments(x)
    work = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mean, x[..., 0].to(work))
    assert (var >= 0).all()
    assert (var <= (4 * torch.finfo(work).eps * value) ** 2).all()


@pytest.mark.parametrize("positions", [5, 100, 800])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_shows(layout: str, positions: int) -> None:
    x = values(2, 3, positions)
    x[0, 1, 2] = float("nan")
    mean, var = moments(laid_out(x, layout))
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[0, 1] = True
    assert torch.equal(mean.isnan(), bad)
    assert torch.equal(var.isnan(), bad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    weight, bias = (values(3, seed=seed).requires_grad_() for seed in (5, 6))

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = values(2, 3, 4, 5).requires_grad_()
        y = run(lambda x: normalized(x.sin(), mixing(weight, bias)).cos(), x)
        return (
            torch.autograd.grad(y.square().sum(), [x, weight, bias])
            if not reentrant
            else leaf(y, x)
        )

    def leaf(y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        weight.grad = bias.grad = None
        y.square().sum().backward()
        return x.grad, weight.grad, bias.grad

    plain = gradients(lambda function, x: function(x))
    got = gradients(lambda function, x: checkpoint(function, x, use_reentrant=reentrant))
    for one, other in zip(got, plain, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_and_second_derivatives() -> None:
    weight, bias = values(3), values(3, seed=5)

    def second(run: Callable[..., Tensor]) -> Tensor:
        x = values(2, 3, 4, 5).requires_grad_()
        y = run(lambda x: normalized(x, mixing(weight, bias)), x)
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    plain = second(lambda function, x: function(x))
    near(second(lambda f, x: checkpoint(f, x, use_reentrant=False)), plain, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_leaves_the_statistics_precise(layout: str, inside: bool) -> None:
    """A half precision input, as autocast's convolutions give, and a single precision one."""
    norm = normswap.build("sn", 6)
    for dtype in (torch.bfloat16, torch.float32):
        x = laid_out((values(4, 6, 5, 7) * 0.1 + 3).to(dtype), layout).requires_grad_()
        direction = values(4, 6, 5, 7, seed=1).to(dtype)
        plain = copy.deepcopy(norm)
        expected = plain(x)
        (expected_grad,) = torch.autograd.grad(expected, x, direction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
            grad = torch.autograd.grad(y, x, direction)[0] if inside else None
        grad = torch.autograd.grad(y, x, direction)[0] if grad is None else grad
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        assert torch.equal(grad, expected_grad)
        assert torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(dtype: torch.dtype) -> None:
    x = values(3, 4, 5, 6).float().requires_grad_()
    weight, bias = (values(4, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    y = normalized(x, mixing(weight, bias))
    y.sum().backward()
    near(y, textbook(x.double(), weight.double(), bias.double()), torch.float32)
    assert weight.grad.dtype == dtype


def test_transforms_of_functions_use_the_plain_formula() -> None:
    weight, bias = values(3), values(3, seed=5)
    x = values(2, 3, 4, 5)

    def loss(x: Tensor) -> Tensor:
        return normalized(x, mixing(weight, bias)).sin().sum()

    wanted = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(textbook(wanted, weight, bias).sin().sum(), wanted)
    near(torch.func.grad(loss)(x), expected, torch.float64)


def test_a_copy_is_independent() -> None:
    norm = normswap.build("sn", 6)
    x = values(4, 6, 5, 7).float()
    y = norm(x)
    other = copy.deepcopy(norm)
    other(x * 3)
    assert not torch.equal(other.running_var, norm.running_var)
    y.sum().backward()
    assert other.weight.grad is None


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["sn", "cn", "ghost_bn"])
def test_compiles_in_one_graph(name: str, training: bool, momentum: float | None) -> None:
    """With a backend that only captures, so that no compiler of C++ is needed."""
    options = {"group_size": 2} if name == "ghost_bn" else {}
    norm = normswap.build(name, 6, **options).double().train(training)
    norm.momentum = momentum
    model = nn.Sequential(norm, nn.ReLU())
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, expected = (values(4, 6, 5, 7, seed=seed).requires_grad_() for _ in range(2))
        direction = values(4, 6, 5, 7, seed=9)
        y, other = compiled(x), plain(expected)
        near(y, other.detach(), torch.float64)
        y.backward(direction), other.backward(direction)
        near(x.grad, expected.grad, torch.float64)
    for one, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        near(one, other.double(), torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_activation_may_overwrite_the_output(layout: torch.memory_format) -> None:
    norm, x = normswap.build("sn", 6).double(), values(3, 6, 5, 5).to(memory_format=layout)
    gradients = []
    for act in (nn.ReLU(), nn.ReLU(inplace=True)):
        other = x.clone(memory_format=torch.preserve_format).requires_grad_()
        act(norm(other)).square().sum().backward()
        gradients.append(other.grad)
    close(*gradients)
