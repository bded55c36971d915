"""Norms whose channels come last, and what runs after a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normswap.norms.statistics.layer import LayerNorm
from tests.norms.cases import (
    BATCH,
    CHANNEL,
    CHANNELS,
    FROZEN,
    GROUP,
    IDENTITY,
    INSTANCE,
    LAYER_2D,
    RMS_2D,
    SINGLE,
    SWITCHABLE,
    SYNC,
    SYNC_OPTION,
    TRACKED_INSTANCE,
    Case,
    affine,
    own,
    start,
    statistics,
)
from tests.reference.data import close, values

TOKENS = [(3, CHANNELS), (3, 5, CHANNELS), (3, 4, 2, CHANNELS), (3, 2, 3, 2, CHANNELS)]
CASES = [
    BATCH,
    SYNC_OPTION,
    SYNC,
    FROZEN,
    GROUP,
    INSTANCE,
    TRACKED_INSTANCE,
    LAYER_2D,
    RMS_2D,
    CHANNEL,
    SWITCHABLE,
    IDENTITY,
]
PAIRS = [
    pytest.param(case, shape, id=f"{case}-{len(shape)}d")
    for case in CASES
    for shape in TOKENS
    if not (case in SINGLE and len(shape) == 2)
]


def by_hand(case: Case, norm: nn.Module, x: Tensor) -> Tensor:
    """The formula on an input whose axes were moved."""
    y = case.train(x.movedim(-1, 1).contiguous(), *affine(norm), statistics(), **own(norm))
    return y.movedim(1, -1)


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_tokens_give_what_moving_the_axes_gives(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = start(case.norm, channel_dim=-1, **case.options), values(*shape)
    close(norm(x), by_hand(case, norm, x))


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_the_gradient_of_tokens_is_that_of_moved_axes(case: Case, shape: tuple[int, ...]) -> None:
    norm, direction = start(case.norm, channel_dim=-1, **case.options), values(*shape, seed=1)
    x, expected = values(*shape).requires_grad_(), values(*shape).requires_grad_()
    norm(x).backward(direction)
    by_hand(case, norm, expected).backward(direction)
    close(x.grad, expected.grad)


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize(("norm", "case"), [("ln", LAYER_2D), ("rms", RMS_2D)])
def test_of_tokens_these_are_over_the_channels_at_each_position(
    norm: str, case: Case, shape: tuple[int, ...]
) -> None:
    module, x = start(norm, channel_dim=-1), values(*shape)
    close(module(x), by_hand(case, module, x))


def test_layer_norm_of_tokens_is_torchs() -> None:
    assert type(start("ln", channel_dim=-1)) is nn.LayerNorm


@pytest.mark.parametrize("shape", TOKENS)
def test_no_copy_is_made_of_tokens(shape: tuple[int, ...]) -> None:
    """A norm that passes its input on shows what reaches it, and what becomes of its output."""
    norm, x = start("bn", channel_dim=-1), values(*shape)
    reached = []
    norm.normalize = lambda inner: reached.append(inner) or inner
    y = norm(x)
    assert reached[0].data_ptr() == x.data_ptr()
    assert reached[0].shape[:2] == (shape[0], CHANNELS)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)


def test_tokens_that_are_not_contiguous_are_normalized_too() -> None:
    norm, x = start("bn", channel_dim=-1), values(3, 2, 4, CHANNELS).transpose(1, 2)
    close(norm(x), by_hand(BATCH, norm, x))


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "frozen_bn", "gn", "in", "ln", "sn", "identity"])
def test_the_input_may_be_given_by_the_name_that_torch_gives_it(norm: str) -> None:
    module, x = start(norm, channel_dim=1), values(3, CHANNELS, 5)
    assert torch.equal(module(input=x), module(x))


def noting(calls: list[str], name: str) -> nn.Module:
    """A layer that notes its name and its input's last dimension, and changes nothing."""

    class Note(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(f"{name} {x.shape[-1]}")
            return x

    return Note()


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(
    "norm", ["bn", "sync_bn", "frozen_bn", "gn", "in", "ln2d", "rms2d", "sn", "identity"]
)
def test_the_tail_runs_in_order_on_the_layers_own_layout(norm: str, channel_dim: int) -> None:
    options = {"sync": True} if norm == "bn" else {}
    module = start(norm, channel_dim=channel_dim, **options)
    calls: list[str] = []
    module.drop, module.act = noting(calls, "drop"), noting(calls, "act")
    module.tail = ("drop", "act")
    module(values(3, CHANNELS, 5) if channel_dim == 1 else values(3, 5, CHANNELS))
    last = 5 if channel_dim == 1 else CHANNELS
    assert calls == [f"drop {last}", f"act {last}"]


def test_the_tail_sees_the_normalized_values() -> None:
    module = start("gn", channel_dim=1)
    x = values(3, CHANNELS, 5)
    plain = module(x)
    module.act = nn.ReLU()
    module.tail = ("act",)
    close(module(x), plain.clamp(min=0))


def test_a_layer_norm_of_tokens_runs_its_tail() -> None:
    module = LayerNorm(CHANNELS).double()
    module.act = nn.ReLU()
    module.tail = ("act",)
    x = values(3, 5, CHANNELS)
    close(module(x), by_hand(LAYER_2D, module, x).clamp(min=0))
