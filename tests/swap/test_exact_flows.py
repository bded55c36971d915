"""Residual streams of odd flows: as RMSNorms they compute the same, or the norms stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import NothingToConvert
from tests.swap.helpers import filled, same_bits

SIZE = 8

Body = Callable[["Block", Tensor], Tensor]


class Scale(nn.Module):
    """A layer with one value for each channel, and any forward."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gamma, self.run = nn.Parameter(torch.ones(SIZE)), forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(self.gamma, *args, **kwargs)


def times(gamma: Tensor, x: Tensor) -> Tensor:
    return x * gamma


def times_in_place(gamma: Tensor, x: Tensor) -> Tensor:
    return x.mul_(gamma)


def times_unseen(gamma: Tensor, x: Tensor) -> Tensor:
    x.data.mul_(gamma)
    return x


def times_and_more(gamma: Tensor, x: Tensor, shift: Any = 0.0) -> Tensor:
    return x * gamma + shift


class Block(nn.Module):
    """What any forward of a block may be made of."""

    def __init__(self, body: Body, scale: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.norm, self.other = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.linear, self.beside = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.scale, self.weight = Scale(scale), nn.Parameter(torch.ones(SIZE, SIZE))
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)
        self.handed_on, self.lstm = nn.Identity(), nn.LSTM(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def added(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def attended(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def model_of(body: Body, scale: Callable[..., Tensor]) -> Any:
    model = nn.Sequential(
        nn.Linear(3, SIZE), Block(body, scale), nn.LayerNorm(SIZE), nn.Linear(SIZE, 2)
    )
    filled(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3
    return model


def numbers() -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()


def read_before(block: Block, x: Tensor) -> Tensor:
    y = block.added(x)
    return x + block.scale(y) + block.beside(block.lstm(y)[0])


def normed_before(block: Block, x: Tensor) -> Tensor:
    y = block.added(x)
    return x + block.scale(y) + block.beside(block.other(y))


def through_a_view(block: Block, x: Tensor) -> Tensor:
    y = block.added(x)
    view = y.view(y.shape)
    y.mul_(block.scale.gamma)
    return x + view


SAME: dict[str, tuple[Body, Callable[..., Tensor]]] = {
    "scaled": (lambda b, x: x + b.scale(b.added(x)), times),
    "scaled in place": (lambda b, x: x + b.scale(b.added(x)), times_in_place),
    "scaled by a view": (lambda b, x: x + b.added(x) * b.scale.gamma.view(1, 1, -1), times),
    "added by keyword": (lambda b, x: x.add(other=b.added(x)), times),
    "added by keywords": (lambda b, x: torch.add(input=x, other=b.scale(b.added(x))), times),
    "added in the scale": (lambda b, x: b.scale(b.added(x), x), times_and_more),
    "one weight twice": (
        lambda b, x: x + F.linear(b.norm(x), b.weight) + F.linear(b.other(x), b.weight),
        times,
    ),
    "attention": (lambda b, x: x + b.attended(b.norm(x)), times),
}

OTHER: dict[str, tuple[Body, Callable[..., Tensor]]] = {
    "by its size": (lambda b, x: x + b.scale(b.added(x)), lambda g, x: x * g.abs()),
    "in bounds": (lambda b, x: x + b.scale(b.added(x)), lambda g, x: (x * g).clamp(-1, 1)),
    "by one more": (lambda b, x: x + b.scale(b.added(x)), lambda g, x: x * (1 + g)),
    "by one more, by keyword": (
        lambda b, x: x + b.scale(b.added(x)),
        lambda g, x: x * torch.add(g, other=1.0),
    ),
    "with a shift": (lambda b, x: x + b.scale(b.added(x), 2.0), times_and_more),
    "unseen": (lambda b, x: x + b.scale(b.added(x)), times_unseen),
    "rectified in place": (lambda b, x: x + F.relu_(b.added(x)), times),
    "a weight used elsewhere": (
        lambda b, x: (
            x + F.linear(b.norm(x), b.weight) + b.beside(F.linear(b.other(x), b.weight).relu())
        ),
        times,
    ),
    "an attention used elsewhere": (
        lambda b, x: x + b.attended(b.norm(x)) + b.beside(b.attended(2 * b.other(x)).relu()),
        times,
    ),
    "read before its scale": (read_before, times),
    "read before its scale by a norm": (normed_before, times),
    "written through a view": (through_a_view, times),
}


def converted(model: Any, *, inference: bool = False) -> Any:
    with torch.inference_mode(inference):
        return normswap.convert(model, "rms", skip="*other", exact=True, example_inputs=numbers())


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("flow", SAME)
def test_it_computes_the_same(flow: str, inference: bool) -> None:
    model = model_of(*SAME[flow])
    with torch.no_grad():
        expected = model(numbers())
        converted(model, inference=inference)
        torch.testing.assert_close(model(numbers()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("flow", OTHER)
def test_the_norms_stay(flow: str, inference: bool) -> None:
    model = model_of(*OTHER[flow])
    expected = model(numbers())
    with pytest.raises(NothingToConvert, match="no RMSNorm can be exact here"):
        converted(model, inference=inference)
    assert same_bits(model(numbers()), expected)


def test_a_hook_on_the_way_sees_what_it_saw() -> None:
    model = model_of(lambda b, x: x + b.scale(b.handed_on(b.added(x))), times)
    model[1].handed_on.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(NothingToConvert, match=r"a hook sees what 1\.handed_on adds"):
        converted(model)


def test_a_hook_before_a_norm_sees_what_it_saw() -> None:
    model = model_of(lambda b, x: x + b.added(x), times)
    model[1].norm.register_forward_pre_hook(lambda module, args: (args[0].square(),))
    with pytest.raises(NothingToConvert, match=r"a hook sees what 1\.norm reads"):
        converted(model)


def test_scales_that_differ_too_much_take_nothing_out() -> None:
    model = model_of(*SAME["scaled"])
    with torch.no_grad():
        model[1].scale.gamma.copy_(torch.logspace(-9, 0, SIZE))
    with pytest.raises(NothingToConvert, match="has no mean to be taken out"):
        converted(model)


def test_planning_draws_no_random_numbers() -> None:
    model = model_of(lambda b, x: x + b.scale(b.added(x)), lambda g, x: x * g + torch.rand(1))
    before = torch.get_rng_state()
    with pytest.raises(NothingToConvert):
        normswap.plan(model, "rms", exact=True, example_inputs=numbers())
    assert torch.equal(torch.get_rng_state(), before)
