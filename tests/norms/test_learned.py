"""What norms learn beside weight and bias: how it starts, and what becomes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NormSwapError
from tests.norms.cases import CHANNELS, set_statistics
from tests.reference.data import close, fill, values

NEUTRAL = ("bin", "adaptive_bn", "iebn")


def batch_norm() -> nn.Module:
    return nn.Sequential(set_statistics(fill(nn.BatchNorm2d(CHANNELS))))


def change(norm: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            if name not in ("weight", "bias"):
                parameter.add_(0.25)


@pytest.mark.parametrize("target", NEUTRAL)
@pytest.mark.parametrize("training", [True, False])
def test_it_starts_as_the_batch_norm_was(target: str, training: bool) -> None:
    model, x = batch_norm().train(training), values(4, CHANNELS, 3, 3)
    expected = model(x)
    model.load_state_dict(batch_norm().state_dict())
    close(normswap.convert(model, target)(x), expected)


@pytest.mark.parametrize("target", ["adaptive_bn", "iebn"])
def test_what_no_other_norm_can_do_is_refused_and_can_be_reverted(target: str) -> None:
    model = normswap.convert(batch_norm(), target)
    change(model[0])
    with pytest.raises(NormSwapError, match=r'learned .*carry="fresh"'):
        normswap.convert(model, "gn", where="*")
    assert type(normswap.revert(model)[0]) is nn.BatchNorm2d


def test_a_gate_of_batch_instance_norm_is_put_back_in_training_only() -> None:
    norm: Any = normswap.build("bin", CHANNELS)
    with torch.no_grad():
        norm.gate.copy_(torch.tensor([-1.0, 0.0, 0.3, 1.0, 1.5, 7.0]))
    before = norm.gate.detach().clone()
    norm.eval()(torch.randn(2, CHANNELS, 3, 3))
    assert torch.equal(norm.gate, before)
    norm.train()(torch.randn(2, CHANNELS, 3, 3))
    assert norm.gate.tolist() == before.clamp(0, 1).tolist()


def test_a_learned_blend_is_matched_as_both_expect_the_same() -> None:
    model = normswap.convert(batch_norm(), "bin")
    with torch.no_grad():
        model[0].gate.fill_(0.4)
    (step,) = normswap.plan(model, "bn")
    assert str(step.fidelity) == "matched"


def test_the_weight_of_enhanced_batch_norm_is_1_plus_e_times_as_large() -> None:
    model = batch_norm()
    weight = model[0].weight.detach().clone()
    normswap.convert(model, "iebn")
    close(model[0].weight, weight * (1 + math.e))
    close(normswap.convert(model, "bn")[0].weight, weight)


def test_extended_batch_norm_and_back_is_the_same_function_in_eval_mode() -> None:
    model, x = batch_norm().eval(), values(4, CHANNELS, 3, 3)
    expected: Tensor = model(x)
    for target in ("ebn", "bn"):
        (step,) = normswap.plan(model, target)
        assert str(step.fidelity) == "eval"
        close(normswap.convert(model, target)(x), expected)


def test_all_channels_by_instance_or_none() -> None:
    x = values(4, CHANNELS, 3, 3)
    alone = fill(normswap.build("ibn", CHANNELS, ratio=1.0))
    close(alone(x), fill(normswap.build("in", CHANNELS))(x))
    none = fill(normswap.build("ibn", CHANNELS, ratio=0.0))
    close(none(x), fill(normswap.build("bn", CHANNELS))(x))
