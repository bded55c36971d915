"""Switchable normalization beyond its outputs: the switch, its start, its degenerate ends."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import DegeneratePooling
from tests.norms.cases import CHANNELS, affine, set_statistics, statistics
from tests.reference import formulas
from tests.reference.data import close, fill, values

SHAPES = [(4, CHANNELS), (4, CHANNELS, 5), (4, CHANNELS, 3, 2), (4, CHANNELS, 2, 3, 2)]


def made(**options: object) -> nn.Module:
    return set_statistics(fill(normswap.build("sn", CHANNELS, **options)))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_of_the_logits_are_the_formulas(
    shape: tuple[int, ...], training: bool, unbiased: bool
) -> None:
    norm = made(unbiased=unbiased).train(training)
    logits = [
        each.detach().clone().requires_grad_() for each in (norm.mean_weight, norm.var_weight)
    ]
    x, direction = values(*shape), values(*shape, seed=1)
    norm(x).backward(direction)
    y = formulas.switchable_norm(
        x, *affine(norm), statistics(), *logits, training=training, unbiased=unbiased
    )
    y.backward(direction)
    close(norm.mean_weight.grad, logits[0].grad)
    close(norm.var_weight.grad, logits[1].grad)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_weighs_the_newest_batch(momentum: float | None) -> None:
    norm, expected = made(), statistics()
    norm.momentum = momentum
    for step in range(3):
        x = values(3, CHANNELS, 2, 2, seed=step)
        norm(x)
        logits = norm.mean_weight.detach(), norm.var_weight.detach()
        formulas.switchable_norm(x, *affine(norm), expected, *logits, momentum=momentum)
    close(norm.running_mean, expected.mean)
    close(norm.running_var, expected.var)


def test_eps_is_added_to_the_mixed_variance() -> None:
    norm, x = made(eps=0.5), values(3, CHANNELS, 2, 2)
    logits = norm.mean_weight.detach(), norm.var_weight.detach()
    close(norm(x), formulas.switchable_norm(x, *affine(norm), statistics(), *logits, eps=0.5))


@torch.no_grad()
def relative_error(kappa: float) -> float:
    batch = set_statistics(fill(nn.Sequential(nn.BatchNorm2d(CHANNELS))[0])).eval()
    model = nn.Sequential(batch)
    x = values(4, CHANNELS, 5, 5, seed=3)
    before = model(x)
    converted = normswap.convert(copy.deepcopy(model), "sn", kappa=kappa)
    return float((converted(x) - before).norm() / before.norm())


def test_the_larger_kappa_the_nearer_to_the_batch_norm() -> None:
    errors = [relative_error(kappa) for kappa in (0, 5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert 1e-6 < errors[2] < 1e-2
    assert errors[4] < 1e-12


@pytest.mark.parametrize(("kappa", "fidelity"), [(10, "near"), (20, "near"), (0, "matched")])
def test_only_a_start_that_is_nearly_a_batch_norm_is_called_near(
    kappa: float, fidelity: str
) -> None:
    (step,) = normswap.plan(nn.Sequential(nn.BatchNorm2d(4)), "sn", kappa=kappa)
    assert str(step.fidelity) == fidelity


def test_a_near_start_says_how_near() -> None:
    (step,) = normswap.plan(nn.Sequential(nn.BatchNorm2d(4)), "sn", kappa=10)
    assert "all but 9e-05 of its statistics" in step.note


def test_back_to_batch_norm_is_near_until_the_switch_has_moved() -> None:
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(4)), "sn")
    fresh = nn.Sequential(copy.deepcopy(model[0]))
    (step,) = normswap.plan(fresh, "bn", where="*", example_inputs=torch.ones(2, 4, 3, 3))
    assert str(step.fidelity) == "near"
    with torch.no_grad():
        fresh[0].var_weight.zero_()
    (step,) = normswap.plan(fresh, "bn", where="*", example_inputs=torch.ones(2, 4, 3, 3))
    assert str(step.fidelity) == "matched"


def test_a_trained_switch_is_matched_by_what_it_is_expected_to_measure() -> None:
    """On one sample whose channels show the running statistics both norms see just these."""
    norm = made().eval()
    x = values(1, CHANNELS, 8, 5)
    x = (x - x.mean((2, 3), keepdim=True)) / x.var((2, 3), keepdim=True).sqrt()
    x = x * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    model = nn.Sequential(norm)
    expected = model(x)
    for target in ("gn", "bn", "ln"):
        other = normswap.convert(copy.deepcopy(model), target, where="*", example_inputs=x)
        error = (other.eval()(x) - expected).norm() / expected.norm()
        assert error < 0.02, (target, error)


def test_a_single_position_is_no_obstacle() -> None:
    norm, x = made(), values(4, CHANNELS, 1, 1)
    logits = norm.mean_weight.detach(), norm.var_weight.detach()
    y: Tensor = norm(x)
    assert y.isfinite().all()
    close(y, formulas.switchable_norm(x, *affine(norm), statistics(), *logits))


def test_a_single_value_is_refused_in_training_only() -> None:
    norm, x = made(), values(1, CHANNELS, 1, 1)
    with pytest.raises(DegeneratePooling, match="single value"):
        norm(x)
    assert norm.eval()(x).isfinite().all()


def test_an_empty_batch_leaves_the_statistics() -> None:
    norm = made()
    x = values(0, CHANNELS, 3, 3).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert torch.equal(norm.running_mean, statistics().mean)
    assert norm.num_batches_tracked == 0


def test_a_checkpoint_of_the_papers_code_fits() -> None:
    theirs = {
        name: values(1, CHANNELS, 1, 1, seed=seed)
        for seed, name in enumerate(("weight", "bias", "running_mean", "running_var"))
    }
    theirs |= {"mean_weight": values(3, seed=8), "var_weight": values(3, seed=9)}
    norm = normswap.build("sn", CHANNELS).double()
    norm.load_state_dict(theirs)
    for name, value in theirs.items():
        assert torch.equal(norm.state_dict()[name], value.flatten())


@pytest.mark.parametrize("kappa", [-1, "much", True, 1000])
def test_kappa_is_a_number(kappa: object) -> None:
    with pytest.raises(normswap.errors.OptionError, match="kappa"):
        normswap.spec("sn", kappa=kappa)
