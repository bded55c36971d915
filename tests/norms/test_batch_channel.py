"""Batch-channel normalization beyond its formula: its start, groups, and small batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling, OptionError
from tests.norms.cases import CHANNELS, set_statistics
from tests.reference.data import close, fill, values


def batch_norm(**options: Any) -> nn.Sequential:
    return nn.Sequential(set_statistics(fill(nn.BatchNorm2d(CHANNELS, **options)))).eval()


def usual(norm: nn.Module, batch: int = 4) -> torch.Tensor:
    """A batch in which every sample's channels show the running statistics."""
    x = values(batch, CHANNELS, 8, 5)
    x = (x - x.mean((2, 3), keepdim=True)) / x.var((2, 3), keepdim=True, correction=0).sqrt()
    return x * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]


@pytest.mark.parametrize("options", [{}, {"affine": False}])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_usual_samples_are_left_as_batch_norm_makes_them(
    groups: int, options: dict[str, Any]
) -> None:
    model = batch_norm(eps=1e-9, **options)
    x, before = usual(model[0]), copy.deepcopy(model[0].state_dict())
    expected = model(x)
    (step,) = normswap.plan(model, "bcn", num_groups=groups)
    assert str(step.fidelity) == "matched"
    normswap.convert(model, "bcn", num_groups=groups)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(model[0].state_dict()[name], value) for name, value in before.items())


def test_groups_that_learned_nothing_leave_the_weight_on_the_way_back() -> None:
    model, x = batch_norm(), values(4, CHANNELS, 3, 2)
    expected = model(x)
    normswap.convert(normswap.convert(model, "bcn"), "bn")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("target", ["bn", "frozen_bn", "in"])
def test_what_groups_have_learned_goes_into_the_weight_of_others(target: str) -> None:
    model = normswap.convert(batch_norm(eps=1e-9), "bcn", num_groups=2)
    with torch.no_grad():
        model[0].group_weight.mul_(torch.tensor([1.5, -0.5]))
        model[0].group_bias.add_(torch.tensor([1.0, 2.0]))
    x = usual(model[0])
    expected = model(x)
    assert str(normswap.plan(model, target, where="*", example_inputs=x)[0].fidelity) == "matched"
    normswap.convert(model, target, where="*", example_inputs=x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_a_weight_of_zero_makes_a_group_that_can_learn() -> None:
    model = batch_norm()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    normswap.convert(model, "bcn")
    model(values(4, CHANNELS, 3, 2)).backward(values(4, CHANNELS, 3, 2, seed=1))
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad.isfinite().all() for grad in grads)
    assert model[0].weight.grad.abs().min() > 0


@pytest.mark.parametrize("options", [{"num_groups": 4}, {"num_groups": 2, "channels_per_group": 3}])
def test_groups_divide_the_channels(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="num_groups"):
        normswap.convert(batch_norm(), "bcn", **options)


def test_a_group_of_a_single_value_is_refused() -> None:
    norm = normswap.build("bcn", CHANNELS, num_groups=CHANNELS)
    with pytest.raises(DegeneratePooling, match="fewer groups"):
        norm.eval()(torch.ones(2, CHANNELS, 1, 1))
    assert norm(values(2, CHANNELS, 1, 2).float()).isfinite().all()


def test_estimated_training_is_evaluation_once_the_batch_is_in() -> None:
    norm = set_statistics(fill(normswap.build("bcn", CHANNELS, estimated=True)))
    x = values(2, CHANNELS, 3, 2)
    y = norm(x)
    close(norm.eval()(x), y)


@pytest.mark.parametrize("method", ["pooled", "population", "average"])
def test_a_pass_finds_the_same_for_estimates(method: str) -> None:
    norms = [normswap.build("bcn", CHANNELS, estimated=flag).double() for flag in (True, False)]
    for norm in norms:
        normswap.warmup(norm, [values(4, CHANNELS, 3, 2)], method=method, progress=False)
    close(norms[0].running_mean, norms[1].running_mean)
    close(norms[0].running_var, norms[1].running_var)
    close(norms[0].running_var, values(4, CHANNELS, 3, 2).var((0, 2, 3)))
