"""A BatchNorm folded into the layer beside it: the same in evaluation, and taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NormSwapError, NothingToConvert
from tests.swap.helpers import (
    COPIES,
    Snapshot,
    batch_net,
    filled,
    image,
    numbers,
    outputs,
    same_state,
    train_step,
)


def agree(a: Tensor, b: Tensor) -> None:
    """Assert that two double precision results differ by rounding only."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


NETS = {
    "conv before": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
        (4, 3, 6, 6),
    ),
    "conv without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)),
        (4, 3, 6, 6),
    ),
    "grouped conv": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8)),
        (4, 4, 6),
    ),
    "transposed conv": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)),
        (4, 4, 6, 6),
    ),
    "conv of three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8)),
        (4, 3, 3, 2, 2),
    ),
    "linear before": (lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), (4, 3)),
    "conv after": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)),
        (4, 4, 6, 6),
    ),
    "linear after": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (4, 4)),
    "without affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)),
        (4, 3, 6, 6),
    ),
}

every_net = pytest.mark.parametrize("name", NETS)


def net(name: str) -> tuple[Any, Tensor]:
    make, shape = NETS[name]
    return filled(make()).double(), numbers(*shape, dtype=torch.float64)


@every_net
def test_evaluation_is_the_same(name: str) -> None:
    model, x = net(name)
    evaluated = outputs(model, x)
    (step,) = normswap.plan(model, "fold", example_inputs=x)
    assert step.fidelity == "eval"
    normswap.convert(model, "fold", example_inputs=x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    agree(outputs(model, x), evaluated)


@every_net
def test_it_comes_back_bit_for_bit(name: str) -> None:
    model, x = net(name)
    before = Snapshot(model)
    normswap.revert(normswap.convert(model, "fold", example_inputs=x))
    before.assert_kept(model)


@every_net
def test_twice_equals_once(name: str) -> None:
    model, x = net(name)
    normswap.convert(model, "fold", example_inputs=x)
    once = Snapshot(model)
    normswap.convert(model, "fold")
    once.assert_kept(model, untouched=True)


def test_a_plan_touches_nothing() -> None:
    model = batch_net()
    before = Snapshot(model)
    normswap.plan(model, "fold")
    before.assert_kept(model, untouched=True)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_back_by_itself(way: str) -> None:
    model = normswap.convert(batch_net(), "fold")
    clone = COPIES[way](model)
    assert same_state(normswap.revert(clone), batch_net())
    assert isinstance(clone[1], nn.BatchNorm2d)
    assert isinstance(model[1], nn.Identity)


def test_it_comes_back_in_the_models_present_precision() -> None:
    model = normswap.convert(batch_net(), "fold").double()
    assert same_state(normswap.revert(model), batch_net().double())


def test_it_comes_back_from_the_middle_of_a_chain() -> None:
    model = batch_net()
    before = Snapshot(model)
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(normswap.convert(model, "fold"), "gn", where="*")
    normswap.revert(model)
    before.assert_kept(model)


def test_a_block_with_it_folded() -> None:
    model = batch_net()
    before = Snapshot(model)
    with normswap.converted(model, "fold"):
        assert isinstance(model[1], nn.Identity)
    before.assert_kept(model)


def test_once_trained_it_cannot_be_taken_apart_and_says_so() -> None:
    model = normswap.convert(batch_net(), "fold")
    train_step(model, image(), torch.optim.SGD(model.parameters(), lr=0.1))
    before = Snapshot(model)
    with pytest.raises(NormSwapError, match="has changed since a norm was folded into it"):
        normswap.revert(model)
    before.assert_kept(model, untouched=True)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_neighbour_as_it_was(
    monkeypatch: pytest.MonkeyPatch, nth: int, error: type[BaseException]
) -> None:
    model = batch_net()
    before = Snapshot(model)
    write, calls = torch.Tensor.copy_, []

    def failing(tensor: Tensor, *args: Any) -> Tensor:
        calls.append(tensor)
        if len(calls) == nth:
            raise error
        return write(tensor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(error):
            normswap.convert(model, "fold")
    before.assert_kept(model)


# -- where it must not be done ------------------------------------------------------------------


class Wired(nn.Module):
    """A convolution and a BatchNorm, with a forward of one's own."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def straight(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x))


def tied() -> Wired:
    model = Wired(lambda m, x: straight(m, x) + m.other(x))
    model.other.weight = model.conv.weight
    return model


def hooked() -> Wired:
    model = Wired(straight)
    model.conv.register_forward_hook(lambda module, args, y: y + 1)
    return model


def pre_hooked() -> Wired:
    model = Wired(straight)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    return model


UNFIT = {
    "the convolution is called twice": lambda: Wired(lambda m, x: m.norm(m.conv(m.conv(x)))),
    "the norm is called twice": lambda: Wired(lambda m, x: m.norm(m.norm(m.conv(x)))),
    "its output is read elsewhere": lambda: Wired(lambda m, x: m.norm(y := m.conv(x)) + y),
    "an activation stands between": lambda: Wired(lambda m, x: m.norm(m.conv(x).relu())),
    "an activation in place": lambda: Wired(lambda m, x: m.norm(m.conv(x).relu_())),
    "its weight is read elsewhere": lambda: Wired(
        lambda m, x: straight(m, x) * m.conv.weight.sum()
    ),
    "its weight is another layer's too": tied,
    "a hook changes its output": hooked,
    "a hook changes the norm's input": pre_hooked,
}


@pytest.mark.parametrize("name", UNFIT)
def test_it_is_not_done_where_the_outputs_would_change(name: str) -> None:
    model = filled(UNFIT[name]())
    before, evaluated = Snapshot(model), outputs(model, image())
    with pytest.raises(NothingToConvert, match=r"norm \(BatchNorm2d\)"):
        normswap.convert(model, "fold")
    before.assert_kept(model, untouched=True)
    agree(outputs(model, image()), evaluated)


def test_a_norm_before_a_padded_convolution_is_not_folded_into_it() -> None:
    """Its borders see zeros, which the norm would have left alone."""
    model = filled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)))
    with pytest.raises(NothingToConvert, match="padding"):
        normswap.convert(model, "fold")


def test_a_norm_that_pools_over_each_sample_cannot_be_folded() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)))
    with pytest.raises(NothingToConvert, match="running statistics"):
        normswap.convert(model, "fold", where="*")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_smallest_change_since_is_noticed(dtype: torch.dtype) -> None:
    model = normswap.convert(batch_net().to(dtype), "fold")
    with torch.no_grad():
        first = model[0].weight.view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 1))
    with pytest.raises(NormSwapError, match="has changed since"):
        normswap.revert(model)


def test_a_linear_before_a_norm_over_positions_is_not_folded() -> None:
    """BatchNorm1d over (B, L, D) normalizes L, and the linear's features are D."""
    model = filled(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    for inputs in (None, numbers(2, 8, 8)):
        with pytest.raises(NothingToConvert, match="features"):
            normswap.convert(model, "fold", example_inputs=inputs)


def test_a_linear_before_a_norm_of_features_is_folded() -> None:
    model = filled(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))).eval().double()
    x = numbers(4, 8, dtype=torch.float64)
    before = model(x)
    normswap.convert(model, "fold", example_inputs=x)
    agree(model(x), before)


def test_a_linear_of_another_size_is_named() -> None:
    model = filled(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(8)))
    with pytest.raises(NothingToConvert, match="6 channels are not the norm's 8"):
        normswap.convert(model, "fold")
