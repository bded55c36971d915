"""Batch renormalization beyond its formula: the schedule, and how it takes a BatchNorm's place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import OptionError
from tests.norms.beyond import buffers_of, parameters_of, set_buffers
from tests.norms.cases import CHANNELS, set_statistics
from tests.reference import own_terms
from tests.reference.data import close, fill, values


def batch_norm(**options: Any) -> nn.Sequential:
    norm = set_statistics(fill(nn.BatchNorm2d(CHANNELS, **options)))
    norm.num_batches_tracked.fill_(30_000)
    return nn.Sequential(norm)


@pytest.mark.parametrize("step", [0, 4999, 5000, 5001, 14_000, 25_000, 31_000, 40_000, 90_000])
def test_the_limits_widen_with_the_steps(step: int) -> None:
    norm: Any = set_buffers(fill(normswap.build("batch_renorm", CHANNELS)))
    norm.num_batches_tracked.fill_(step)
    norm.running_std.mul_(10)
    norm.running_mean.sub_(60)
    x, buffers = values(4, CHANNELS, 3, 2), buffers_of(norm)
    close(norm(x), own_terms.batch_renorm()(x, parameters_of(norm), buffers, True))
    assert norm.num_batches_tracked == step + 1


@pytest.mark.parametrize(("norm", "kept"), [({}, 0), ({"momentum": None}, 30_000)])
def test_steps_are_counted_anew_but_for_a_plain_average(norm: dict[str, Any], kept: int) -> None:
    """Which a batch that counts as the first would wipe out."""
    model = normswap.convert(batch_norm(**norm), "batch_renorm")
    assert model[0].num_batches_tracked == kept


def test_the_first_step_in_a_batch_norms_place_is_a_batch_norms() -> None:
    model, x = batch_norm(), values(4, CHANNELS, 3, 2)
    other = normswap.convert(copy.deepcopy(model), "batch_renorm")
    close(other(x), model(x))


def test_what_it_learned_to_evaluate_by_goes_on_in_a_batch_norm() -> None:
    model = normswap.convert(batch_norm(), "batch_renorm", r_max=2.0, d_max=1.0)
    for seed in range(3):
        model(values(4, CHANNELS, 3, 2, seed=seed))
    x = values(4, CHANNELS, 3, 2, seed=9)
    expected = model.eval()(x)
    assert str(normswap.plan(model, "bn", where="*")[0].fidelity) == "eval"
    close(normswap.convert(model, "bn", where="*")(x), expected)


def test_another_eps_evaluates_the_same_as_the_deviation_includes_the_sources() -> None:
    model, x = batch_norm().eval(), values(4, CHANNELS, 3, 2)
    expected = model(x)
    assert str(normswap.plan(model, "batch_renorm", eps=0.1)[0].fidelity) == "eval"
    assert normswap.convert(model, "batch_renorm", eps=0.1)[0].eps == 0.1
    close(model(x), expected)
    close(normswap.convert(model, "bn")(x), expected)


LIMITS: list[dict[str, Any]] = [{"r_max": 0.5}, {"d_max": -1}, {"r_max": "3"}, {"d_max": True}]


@pytest.mark.parametrize("options", LIMITS)
def test_limits_are_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        normswap.spec("batch_renorm", **options)


def test_no_gradient_goes_into_what_corrects() -> None:
    """As if r and d were numbers: the gradient is a batch norm's, scaled by r."""
    norm: Any = set_buffers(fill(normswap.build("batch_renorm", CHANNELS, r_max=9.0, d_max=9.0)))
    x, direction = values(4, CHANNELS, 3, 2).requires_grad_(), values(4, CHANNELS, 3, 2, seed=1)
    r = (x.detach().var((0, 2, 3), correction=0) + norm.eps).sqrt() / norm.running_std
    norm(x).backward(direction)
    plain, other = fill(nn.BatchNorm2d(CHANNELS)), x.detach().clone().requires_grad_()
    plain(other).backward(direction)
    assert torch.all((r < 9) & (r > 1 / 9))
    close(x.grad, other.grad * r[:, None, None])


@pytest.mark.parametrize("sizes", [[20], [8, 8, 4], [1] * 20])
@pytest.mark.parametrize("method", ["pooled", "population"])
def test_a_pass_finds_the_deviation_of_all(method: str, sizes: list[int]) -> None:
    norm: Any = set_buffers(fill(normswap.build("batch_renorm", CHANNELS))).eval()
    norm.num_batches_tracked.fill_(9000)
    data = values(20, CHANNELS, 3, 2)
    normswap.warmup(norm, list(data.split(sizes)), method=method, progress=False)
    close(norm.running_mean, data.mean((0, 2, 3)))
    close(norm.running_std, (data.var((0, 2, 3)) + norm.eps).sqrt())
    assert norm.num_batches_tracked == 9000  # the steps of training, which these are not
    assert norm.running_var is None


@pytest.mark.parametrize("method", ["average", "ema"])
def test_a_pass_averages_variances(method: str) -> None:
    norm: Any = set_buffers(fill(normswap.build("batch_renorm", CHANNELS))).eval()
    mean, var = norm.running_mean.clone(), norm.running_std.square() - norm.eps
    batches = [values(4, CHANNELS, 3, 2, seed=seed) for seed in range(3)]
    normswap.warmup(norm, batches, method=method, progress=False)
    for step, batch in enumerate(batches):
        share = 0.1 if method == "ema" else 1 / (step + 1)
        mean = (1 - share) * mean + share * batch.mean((0, 2, 3))
        var = (1 - share) * var + share * batch.var((0, 2, 3))
    close(norm.running_mean, mean)
    close(norm.running_std, (var + norm.eps).sqrt())


def test_a_pass_feeds_what_follows_by_what_it_found() -> None:
    """As of one giant batch in training, which divides by the biased variance."""
    norms: list[Any] = [normswap.build("batch_renorm", CHANNELS).double() for _ in range(2)]
    model, data = nn.Sequential(norms[0], nn.Tanh(), norms[1]).eval(), values(9, CHANNELS, 3, 2)
    normswap.warmup(model, list(data.split(4)), method="population", progress=False)
    away = data - data.mean((0, 2, 3), keepdim=True)
    seen = (away / (data.var((0, 2, 3), correction=0, keepdim=True) + norms[0].eps).sqrt()).tanh()
    close(norms[1].running_mean, seen.mean((0, 2, 3)))
    close(norms[1].running_std, (seen.var((0, 2, 3)) + norms[1].eps).sqrt())
