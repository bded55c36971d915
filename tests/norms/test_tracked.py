"""Norms that keep running statistics in terms of their own, beyond their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling
from tests.norms.beyond import CHANNELS, buffers_of, equal
from tests.reference.data import close, fill, values

TRACKED = ["l1_bn", "iter_norm", "batch_renorm", "transnorm"]
each_norm = pytest.mark.parametrize("norm", TRACKED)


@each_norm
@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_weighs_the_newest_batch(norm: str, momentum: float | None) -> None:
    module = normswap.build(norm, CHANNELS).double()
    module.momentum = momentum
    fresh = buffers_of(module)
    lone = []
    for step in range(3):
        other = normswap.build(norm, CHANNELS, momentum=1.0).double()
        x = values(4, CHANNELS, 3, 2, seed=step)
        other(x)
        module(x)
        lone.append(buffers_of(other))
    for name, kept in buffers_of(module).items():
        if name == "num_batches_tracked":
            assert kept == 3
            continue
        expected = fresh[name]
        for step, each in enumerate(lone):
            weight = 1 / (step + 1) if momentum is None else momentum
            expected = (1 - weight) * expected + weight * each[name]
        close(kept, expected)


@each_norm
def test_an_empty_batch_leaves_what_is_kept(norm: str) -> None:
    module = normswap.build(norm, CHANNELS, sync=True)
    before = buffers_of(module)
    x = torch.zeros(0, CHANNELS, 3, 3, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert equal(buffers_of(module), before)


@each_norm
def test_a_single_value_is_refused_in_training_only(norm: str) -> None:
    module, x = normswap.build(norm, CHANNELS), torch.ones(1, CHANNELS, 1, 1)
    before = buffers_of(module)
    with pytest.raises(DegeneratePooling, match=r"single value|one sample"):
        module(x)
    assert equal(buffers_of(module), before)
    assert module.eval()(x).isfinite().all()


@each_norm
def test_a_constant_channel_stays_finite(norm: str) -> None:
    module, x = normswap.build(norm, CHANNELS), torch.ones(2, CHANNELS, 3, 3, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@each_norm
def test_a_large_mean_spoils_nothing(norm: str) -> None:
    module, other = normswap.build(norm, CHANNELS), normswap.build(norm, CHANNELS).double()
    x = values(8, CHANNELS, 6, 6).float() + 1000
    torch.testing.assert_close(module(x).double(), other(x.double()), rtol=0, atol=2e-3)


def network(**options: Any) -> nn.Module:
    """A small net whose running statistics are those of some training."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS, **options),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, 8, 3),
        nn.BatchNorm2d(8, **options),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    fill(model).float()
    for step in range(20):
        model(values(8, 3, 9, 9, seed=step).float())
    return model.eval()


@torch.no_grad()
def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@each_norm
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-3, "momentum": None}])
def test_a_whole_network_evaluates_as_before(norm: str, options: dict[str, Any]) -> None:
    model, x = network(**options), values(4, 3, 9, 9, seed=99).float()
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = normswap.plan(model, norm, min_fidelity="eval")
    assert {str(step.fidelity) for step in plan.of("convert")} == {"eval"}
    normswap.convert(model, norm)
    assert far(model(x), expected) < 1e-6
    normswap.convert(model, "bn", where=f"kind:{norm}")
    assert isinstance(model[1], nn.BatchNorm2d)
    assert far(model(x), expected) < 1e-6
    normswap.revert(model)
    assert equal(dict(model.state_dict()), state)


@each_norm
def test_reverting_after_training_gives_the_statistics_of_before(norm: str) -> None:
    """A mean that moved on beside a variance that did not would fit nothing."""
    model = network()
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    normswap.convert(model, norm).train()
    model(values(8, 3, 9, 9, seed=50).float())
    normswap.revert(model)
    assert torch.equal(model[1].running_mean, before[0])
    assert torch.equal(model[1].running_var, before[1])


@each_norm
def test_another_norm_in_its_place_does_not_move_its_statistics(norm: str) -> None:
    model = nn.Sequential(normswap.build(norm, CHANNELS))
    model(values(8, CHANNELS, 3, 3, seed=50).float())
    before = buffers_of(model[0])
    x = values(8, CHANNELS, 3, 3, seed=51).float()
    normswap.convert(model, "bn", where="*", example_inputs=x)(x)
    assert equal(buffers_of(normswap.revert(model)[0]), before)


@pytest.mark.parametrize("norm", [norm for norm in TRACKED if norm != "batch_renorm"])
def test_a_statistics_pass_leaves_it_and_says_why(norm: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), normswap.build(norm, CHANNELS))
    before = buffers_of(model[1])
    report = normswap.warmup(model, [values(4, CHANNELS, 3, 3).float()], progress=False)
    assert "only training updates it" in str(report)
    assert equal(buffers_of(model[1]), before)


@each_norm
def test_without_statistics_of_the_source_it_says_so(norm: str) -> None:
    model = nn.Sequential(nn.GroupNorm(2, CHANNELS))
    (step,) = normswap.plan(model, norm, where="*")
    assert "train before evaluating" in step.note
    assert step.fidelity == "affine"


@each_norm
def test_a_calibration_leaves_what_only_training_measures(norm: str) -> None:
    model = nn.Sequential(nn.GroupNorm(2, CHANNELS), nn.Conv2d(CHANNELS, 4, 1), nn.GroupNorm(2, 4))
    loader = [values(4, CHANNELS, 3, 3, seed=seed).float() for seed in range(3)]
    normswap.convert(model, {"0": norm, "2": "in"})
    before = buffers_of(model[0])
    report = normswap.calibrate(model, loader, progress=False)
    assert "which only training measures" in str(report)
    assert equal(buffers_of(model[0]), before)
