"""Kalman normalization: the prior by its formula, and where the graph shows one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from tests.reference.beyond import along
from tests.reference.data import close, fill, values
from tests.reference.ranks import on_ranks

C = 5


def kalman(**options: Any) -> Any:
    module: Any = fill(normswap.build("kalman", C, **options))
    return module


def by_formula(
    x: Tensor, norm: Any, prior: tuple[Tensor, Tensor] | None, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Wang et al. 2018, train mode; with it the mean and the variance that are kept."""
    dims, count = (0, *range(2, x.ndim)), x.numel() // C
    mean = x.sum(dims) / count
    var = ((x - along(mean, x)) ** 2).sum(dims) / count
    if prior is None:
        kept = var * count / (count - 1)
    else:
        foretold, expected = prior
        if float((expected / var).mean()) >= 100:  # it is dropped
            weight = 0.0
        away = weight * (1 - weight) * (mean - foretold) ** 2
        kept = var = weight * expected + (1 - weight) * var + away
        mean = weight * foretold + (1 - weight) * mean
    y = (x - along(mean, x)) / along((var + 1e-5) ** 0.5, x)
    return along(norm.weight, x) * y + along(norm.bias, x), mean, kept


@pytest.mark.parametrize("shape", [(6, C), (4, C, 7), (3, C, 4, 2), (2, C, 2, 3, 2)])
@pytest.mark.parametrize("weight", [0.05, 0.9])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["likely", "unlikely"])
def test_a_prior_that_is_given(shape: tuple[int, ...], weight: float, scale: float) -> None:
    norm = kalman(prior_weight=weight)
    x, other = values(*shape).requires_grad_(), values(*shape).requires_grad_()
    pair = [values(C, seed=3), values(C, seed=4).abs() * scale]
    prior, like = ([t.clone().requires_grad_() for t in pair] for _ in range(2))
    y = norm(x, prior=tuple(prior))
    expected, mean, var = by_formula(other, norm, (like[0], like[1]), weight)
    close(y, expected)
    wanted = [norm.weight, norm.bias]
    direction = values(*shape, seed=1)
    given = [*prior, *like] if scale == 1 else []  # an unlikely prior has no part in it
    found = torch.autograd.grad(y, [x, *given[:2], *wanted], direction)
    told = torch.autograd.grad(expected, [other, *given[2:], *wanted], direction)
    for one, other_one in zip(found, told, strict=True):
        close(one, other_one)
    close(norm.running_mean, 0.1 * mean.detach())
    close(norm.running_var, 0.9 + 0.1 * var.detach())
    assert norm.num_batches_tracked == 1


def test_without_a_prior_and_in_eval_mode_it_is_batch_norm() -> None:
    norm, plain = kalman(), fill(nn.BatchNorm2d(C))
    for step in range(3):
        x = values(4, C, 3, 2, seed=step)
        close(norm(x), plain(x))
    x = values(4, C, 3, 2, seed=9)
    close(norm.eval()(x, prior=(values(C), values(C).abs())), plain.eval()(x))


class Net(nn.Module):
    """Convolutions in a row, with what stands between; then a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, 2 * C, 3, padding=1, groups=C), nn.BatchNorm2d(2 * C)
        self.conv3, self.bn3 = nn.Conv2d(2 * C, C, 1), nn.BatchNorm2d(C)
        self.conv4, self.bn4 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.silu(self.bn2(self.conv2(x)))))
        return self.bn4(self.conv4(self.relu(x + y)))


def model() -> Any:
    return fill(Net())


def behind_relu(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a ReLU of Gaussian values, by the error function."""
    spread = deviation.abs()
    below = (1 + torch.erf(mean / spread / 2**0.5)) / 2
    density = torch.exp(-((mean / spread) ** 2) / 2) / (2 * torch.pi) ** 0.5
    first = mean * below + spread * density
    return first, (mean**2 + spread**2) * below + mean * spread * density - first**2


def test_a_prior_is_foretold_by_the_norm_before() -> None:
    net = normswap.convert(model(), "kalman", prior_weight=0.3)
    inputs: list[Tensor] = []
    net.bn2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    outputs: list[Tensor] = []
    net.bn2.register_forward_hook(lambda module, args, y: outputs.append(y))
    net(values(2, 3, 6, 6))
    mean, var = behind_relu(net.bn1.bias, net.bn1.weight)
    filters = net.conv2.weight.view(C, 2, 9)
    prior = (
        (filters.sum(2) * mean[:, None]).flatten() + net.conv2.bias,
        ((filters**2).sum(2) * var[:, None]).flatten(),
    )
    x = inputs[0]
    dims, count = (0, 2, 3), x.numel() // (2 * C)
    own_mean = x.mean(dims)
    own_var = ((x - along(own_mean, x)) ** 2).sum(dims) / count
    spread = 0.3 * prior[1] + 0.7 * own_var + 0.21 * (own_mean - prior[0]) ** 2
    centre = 0.3 * prior[0] + 0.7 * own_mean
    y = along(net.bn2.weight, x) * (x - along(centre, x)) / along((spread + 1e-5) ** 0.5, x)
    close(outputs[0], y + along(net.bn2.bias, x))
    sloped = torch.autograd.grad(outputs[0].square().sum(), [net.bn1.weight, net.conv2.weight])
    assert all(gradient.abs().sum() > 0 for gradient in sloped)


def test_the_plan_says_where_there_is_a_prior_and_why_elsewhere_not() -> None:
    steps = {step.site.path: step for step in normswap.plan(model(), "kalman")}
    assert steps["bn1"].fidelity == "exact"
    assert "without a prior: no norm stands before" in steps["bn1"].note
    assert steps["bn2"].fidelity == "eval"
    assert "its prior is through conv2" in steps["bn2"].note
    assert "its prior is through conv3" in steps["bn3"].note
    assert "without a prior" in steps["bn4"].note


def test_in_eval_mode_nothing_changes() -> None:
    net, plain = model().eval(), model().eval()
    close(normswap.convert(net, "kalman")(values(2, 3, 6, 6)), plain(values(2, 3, 6, 6)))


def test_references_are_no_children_and_follow() -> None:
    net = normswap.convert(model(), "kalman")
    keys = list(model().state_dict())
    assert list(net.state_dict()) == keys
    assert len(list(net.parameters())) == len(list(model().parameters()))
    assert net.bn2.previous is net.bn1
    assert net.bn2.producer is net.conv2
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.bn2.previous is other.bn1
        assert other.bn2.producer is other.conv2
    normswap.convert(net, "gn", where="bn1", num_groups=1)
    assert net.bn2.previous is net.bn1
    assert type(net.bn1).__name__ == "GroupNorm"
    net(values(2, 3, 6, 6)).sum().backward()
    normswap.revert(net.bn1)
    normswap.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in model().modules()]


def test_a_statistics_pass_measures_the_batches_alone() -> None:
    net, plain = normswap.convert(model(), "kalman", prior_weight=0.9), model()
    loader = [values(4, 3, 6, 6, seed=seed) for seed in range(3)]
    for each in (net, plain):
        normswap.warmup(each, loader, method="population", progress=False)
    close(net.bn2.running_mean, plain.bn2.running_mean)
    close(net.bn2.running_var, plain.bn2.running_var)


def part(rank: int) -> dict[str, Any]:
    """One step of two ranks, of which one has more samples."""
    net = normswap.convert(model(), "kalman", prior_weight=0.4, sync=True)
    x = values(5, 3, 6, 6)[slice(0, 4) if rank == 0 else slice(4, 5)].requires_grad_()
    y = net(x)
    y.backward(values(5, *y.shape[1:], seed=1)[slice(0, 4) if rank == 0 else slice(4, 5)])
    grads = {name: p.grad for name, p in net.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "kept": dict(net.named_buffers()), "grads": grads}


def test_ranks_are_as_one_process(tmp_path: Path) -> None:
    net = normswap.convert(model(), "kalman", prior_weight=0.4)
    x = values(5, 3, 6, 6).requires_grad_()
    y = net(x)
    y.backward(values(*y.shape, seed=1))
    ranks = on_ranks(2, part, tmp_path)
    close(torch.cat([rank["y"] for rank in ranks]), y.detach())
    close(torch.cat([rank["x"] for rank in ranks]), x.grad)
    for name, buffer in net.named_buffers():
        for rank in ranks:
            close(rank["kept"][name], buffer)
    for name, parameter in net.named_parameters():
        close(sum(rank["grads"][name] for rank in ranks), parameter.grad)


@pytest.mark.parametrize("norm", ["gn", "ln", "ebn", "evonorm_s0"])
def test_a_norm_that_standardizes_no_channel_foretells_nothing(norm: str) -> None:
    net = normswap.convert(model(), norm, where="bn1")
    steps = {
        step.site.path: step.note for step in normswap.plan(net, "kalman", where=["bn2", "bn3"])
    }
    assert "does not standardize each channel" in steps["bn2"]
    assert "its prior is through conv3" in steps["bn3"]


def test_a_prior_ends_where_another_norm_stands_before_and_comes_back_with_the_first() -> None:
    net = normswap.convert(model(), "kalman", prior_weight=0.5)
    x = values(2, C, 4, 4)

    def second() -> Tensor:
        return net.bn2(net.conv2(x))

    before = second()
    normswap.convert(net, "gn", where="bn1", num_groups=1)
    assert not torch.allclose(second(), before)
    close(second(), F.batch_norm(
        net.conv2(x), None, None, net.bn2.weight, net.bn2.bias, training=True
    ))  # fmt: skip
