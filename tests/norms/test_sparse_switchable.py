"""Sparse switchable normalization beyond its outputs: sparsestmax, and how the switch settles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from normswap.norms.statistics import sparsestmax as module
from normswap.norms.statistics.sparsestmax import sparsestmax
from tests.norms.cases import CHANNELS, affine, set_statistics, statistics
from tests.reference import formulas
from tests.reference import sparsestmax as reference
from tests.reference.data import close, fill, values

RADII = (0.0, 0.2, 0.45, 0.6, 0.75, 0.9)


def logits(seed: int, size: int = 3) -> Tensor:
    """Such that one, two or all have a share, depending on the seed."""
    return (values(size, seed=seed) - 0.5) / (1 + seed % 5)


def made(**options: Any) -> Any:
    """A norm whose logits give all three a share."""
    norm: Any = set_statistics(fill(normswap.build("ssn", CHANNELS, **options)))
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([0.1, 0.3, 0.2]))
        norm.var_weight.copy_(torch.tensor([0.5, -0.1, 0.2]))
    return norm


@pytest.fixture(params=["numbers", "operations"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, and as on another device or under a compiler."""
    if request.param != "numbers":
        monkeypatch.setattr(module, "at_hand", lambda tensor: False)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_sparsestmax_and_its_gradient_are_the_papers(size: int, radius: float) -> None:
    for seed in range(40):
        ours, theirs = (logits(seed, size).requires_grad_() for _ in range(2))
        shares = sparsestmax(ours, torch.tensor([radius], dtype=torch.float64))
        expected = reference.sparsestmax(theirs, radius)
        close(shares, expected)
        direction = values(size, seed=seed + 100)
        (found,) = torch.autograd.grad(shares, ours, direction)
        (wanted,) = torch.autograd.grad(expected, theirs, direction)
        close(found, wanted)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("radius", [0.0, 0.45])
def test_logits_that_are_no_numbers_are_not_hidden(radius: float) -> None:
    broken = torch.tensor([[0.1, float("nan"), 0.2], [0.1, 0.3, 0.2]])
    shares = sparsestmax(broken, torch.tensor([radius]))
    assert shares[0].isnan().all()
    assert shares[1].isfinite().all()


@pytest.mark.usefixtures("_way")
def test_no_rows_have_no_shares() -> None:
    assert sparsestmax(torch.zeros(0, 3), torch.tensor([0.5])).shape == (0, 3)


@pytest.mark.usefixtures("_way")
def test_the_gradient_of_sparsestmax_is_differentiable() -> None:
    radius = torch.tensor([0.3], dtype=torch.float64)
    rows = torch.stack([logits(seed) for seed in range(4)]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda each: sparsestmax(each, radius), [rows])


@pytest.mark.usefixtures("_way")
def test_many_gradients_at_once_are_as_each_alone() -> None:
    rows = torch.stack([logits(seed) for seed in range(4)]).requires_grad_()
    shares = sparsestmax(rows, torch.tensor([0.3], dtype=torch.float64))
    directions = values(5, 4, 3)
    (together,) = torch.autograd.grad(
        shares, rows, directions, is_grads_batched=True, retain_graph=True
    )
    alone = [torch.autograd.grad(shares, rows, each, retain_graph=True)[0] for each in directions]
    close(together, torch.stack(alone))


@pytest.mark.usefixtures("_way")
def test_several_rows_are_as_each_alone() -> None:
    rows = torch.stack([logits(seed) for seed in range(8)])
    radius = torch.tensor([0.5], dtype=torch.float64)
    close(sparsestmax(rows, radius), torch.stack([sparsestmax(row, radius) for row in rows]))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("radius", RADII)
def test_equal_logits_stay_even(radius: float) -> None:
    even = torch.full((3,), 0.7, requires_grad=True)
    shares = sparsestmax(even, torch.tensor([radius]))
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3))
    (slope,) = torch.autograd.grad(shares, even, torch.tensor([1.0, 2.0, 4.0]))
    assert slope.isfinite().all()


@pytest.mark.parametrize("radius", [0.2, 0.45, 0.9])
@pytest.mark.parametrize("training", [True, False])
def test_the_radius_pushes_the_shares_apart(radius: float, training: bool) -> None:
    norm = made().train(training)
    norm.radius.fill_(radius)
    learned = [p.detach().clone().requires_grad_() for p in (norm.mean_weight, norm.var_weight)]
    x, direction = values(4, CHANNELS, 3, 2), values(4, CHANNELS, 3, 2, seed=1)
    y = formulas.switchable_norm(
        x,
        *affine(norm),
        statistics(),
        *learned,
        training=training,
        shares_of=lambda each: reference.sparsestmax(each, float(norm.radius)),
    )
    close(norm(x), y)
    norm(x).backward(direction)
    y.backward(direction)
    if radius < 0.5:
        close(norm.mean_weight.grad, learned[0].grad)
        close(norm.var_weight.grad, learned[1].grad)
    else:
        assert not norm.mean_weight.grad.any()


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check: Any) -> None:
    norm = made().eval()
    norm.radius.fill_(0.3)
    names = [name for name, _ in norm.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(norm, given, (x,))
        return y

    inputs = [values(2, CHANNELS, 2), *(p.detach().clone() for p in norm.parameters())]
    assert check(run, [each.requires_grad_() for each in inputs])


def test_a_switch_that_came_to_a_corner_in_training_stays() -> None:
    norm, x = made(), values(4, CHANNELS, 3, 2)
    norm.radius.fill_(0.9)
    norm(x).sum().backward()
    assert norm.mean_fixed == norm.var_fixed == 1
    assert norm.mean_weight.tolist() == [0, 1, 0]
    assert norm.var_weight.tolist() == [1, 0, 0]
    expected = norm.eval()(x)
    norm.radius.zero_()
    with torch.no_grad():  # as weight decay and momentum may do
        norm.mean_weight.mul_(0.5)
        norm.var_weight.add_(torch.tensor([-0.2, 0.2, 0.0]))
    close(norm(x), expected)
    norm.train()(x).sum().backward()
    assert norm.mean_weight.tolist() == [0, 1, 0]
    assert norm.var_weight.tolist() == [1, 0, 0]


@pytest.mark.parametrize("radius", [0.0, 0.9])
def test_evaluation_changes_nothing(radius: float) -> None:
    norm = made().eval()
    norm.radius.fill_(radius)
    with torch.no_grad():
        norm.var_weight.copy_(torch.tensor([0.0, 0.0, 1.0]))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm(values(4, CHANNELS, 3, 2)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_a_statistics_pass_settles_nothing() -> None:
    norm = made().eval()
    norm.radius.fill_(0.9)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for method in ("pooled", "population", "ema", "average"):
        normswap.warmup(norm, [values(4, CHANNELS, 3, 2)], method=method, progress=False)
    for name, tensor in norm.state_dict().items():
        running = name.startswith("running") or name == "num_batches_tracked"
        assert torch.equal(tensor, before[name]) != running, name


def test_the_radius_grows_in_all_of_a_model() -> None:
    model = nn.Sequential(made(), nn.Sequential(made(), nn.BatchNorm2d(CHANNELS)))
    normswap.set_radius(model, 3, 4)
    assert model[0].radius == model[1][0].radius == 0.75
    normswap.set_radius(model, 0, 4)
    assert model[0].radius == 0


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (5, 4), (0, 0)])
def test_the_radius_is_a_share_of_the_steps(step: int, total: int) -> None:
    with pytest.raises(OptionError, match="step"):
        normswap.set_radius(made(), step, total)


@torch.no_grad()
def relative_error(delta: float) -> float:
    model = nn.Sequential(set_statistics(fill(nn.BatchNorm2d(CHANNELS)))).eval()
    x = values(4, CHANNELS, 5, 5, seed=3)
    before = model(x)
    converted = normswap.convert(copy.deepcopy(model), "ssn", delta=delta)
    return float((converted(x) - before).norm() / before.norm())


def test_the_smaller_delta_the_nearer_to_the_batch_norm() -> None:
    errors = [relative_error(delta) for delta in (1, 0.1, 1e-4, 1e-6, 0)]
    assert errors == sorted(errors, reverse=True)
    assert 1e-7 < errors[2] < 1e-2
    assert errors[4] < 1e-12


def test_the_start_is_near_and_learns() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    (step,) = normswap.plan(model, "ssn")
    assert str(step.fidelity) == "near"
    assert "all but 7e-05 of its statistics" in step.note
    norm: Any = normswap.convert(model, "ssn")[0]
    norm(values(4, CHANNELS, 3, 2).float()).backward(values(4, CHANNELS, 3, 2, seed=1).float())
    assert norm.mean_weight.grad.abs().min() > 0
    assert norm.mean_fixed == norm.var_fixed == 0


@pytest.mark.parametrize("delta", [-1, "much", True, 2])
def test_delta_is_a_share(delta: object) -> None:
    with pytest.raises(OptionError, match="delta"):
        normswap.spec("ssn", delta=delta)
