"""Mixtures of affines beyond their formula: their start, what they learn, the features' batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling, NormSwapError, OptionError
from tests.norms.cases import CHANNELS, set_statistics
from tests.reference.data import close, fill, values

WAYS = range(7)
NORMALIZED = (2, 3, 5, 6)
each_way = pytest.mark.parametrize("way", WAYS)


def batch_norm(**options: Any) -> nn.Sequential:
    return nn.Sequential(set_statistics(fill(nn.BatchNorm2d(CHANNELS, **options))))


@each_way
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_starts_as_the_batch_norm_was(way: int, affine: bool, training: bool) -> None:
    model, x = batch_norm(affine=affine).train(training), values(4, CHANNELS, 3, 3)
    other = copy.deepcopy(model)
    assert str(normswap.plan(other, "an", attention=way)[0].fidelity) == "exact"
    close(normswap.convert(other, "an", attention=way)(x), model(x))


@each_way
def test_mixtures_separate_from_the_start(way: int) -> None:
    model = normswap.convert(batch_norm(), "an", attention=way, num_mixtures=3)
    norm: Any = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model(values(4, CHANNELS, 3, 3, seed=seed)).backward(values(4, CHANNELS, 3, 3, seed=9))
        optimizer.step()
    grads = norm.weight_delta.grad
    assert not torch.allclose(grads[0], grads[1])
    moved = norm.attention_gain if way in NORMALIZED else norm.attention_weight[:, 0]
    assert len(set(moved.tolist())) == 3
    x = values(4, CHANNELS, 3, 3, seed=5)
    alone, together = model.eval()(x[:1]), model(x)[:1]
    close(alone, together)


def test_conversions_are_all_the_same() -> None:
    one, other = (normswap.convert(batch_norm(), "an").state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_noise_is_of_the_weights_size_and_never_zero() -> None:
    model = batch_norm()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0, -100.0, 1.0, 1.0, 1.0]))
    spread = normswap.convert(model, "an")[0].weight_delta.std(0)
    assert spread.min() > 0.01
    assert spread[2] > 2 * spread[1]


@each_way
def test_what_it_has_learned_is_refused_elsewhere_and_can_be_reverted(way: int) -> None:
    model = normswap.convert(batch_norm(), "an", attention=way)
    assert str(normswap.plan(model, "bn")[0].fidelity) == "exact"
    with torch.no_grad():
        model[0].attention_bias.add_(values(10))
    with pytest.raises(NormSwapError, match=r'learned .*carry="fresh"'):
        normswap.convert(model, "gn", where="*")
    assert type(normswap.revert(model)[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("way", NORMALIZED)
def test_features_of_one_sample_are_no_batch(way: int) -> None:
    norm = normswap.build("an", CHANNELS, attention=way)
    x = values(1, CHANNELS, 3, 3).float()
    with pytest.raises(DegeneratePooling, match="larger batch"):
        norm(x)
    assert norm.eval()(x).isfinite().all()


def test_the_plain_average_counts_each_batch_once() -> None:
    norm: Any = fill(normswap.build("an", CHANNELS, attention=3))
    norm.momentum = None
    alone = []
    for step in range(3):
        x = values(4, CHANNELS, 3, 3, seed=step)
        other: Any = fill(normswap.build("an", CHANNELS, attention=3, momentum=1.0))
        other(x)
        norm(x)
        alone.append(other)
    assert norm.num_batches_tracked == 3
    for name in ("running_mean", "running_var", "hidden_var", "attention_mean"):
        close(norm.get_buffer(name), sum(other.get_buffer(name) for other in alone) / 3)


@pytest.mark.parametrize("method", ["pooled", "population", "average", "ema"])
def test_a_statistics_pass_leaves_the_features_batch(method: str) -> None:
    norm: Any = set_statistics(fill(normswap.build("an", CHANNELS)))
    norm.attention_mean.add_(1)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    data = values(4, CHANNELS, 3, 3)
    normswap.warmup(norm, list(data.split(1)), method=method, progress=False)
    for name, tensor in norm.state_dict().items():
        running = name.startswith("running") or name == "num_batches_tracked"
        assert torch.equal(tensor, before[name]) != running, name
    if method == "population":
        close(norm.running_var, data.var((0, 2, 3)))


@pytest.mark.parametrize("options", [{"attention": 7}, {"attention": True}, {"num_mixtures": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        normswap.spec("an", **options)
