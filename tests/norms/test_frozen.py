"""FrozenBatchNorm: nothing moves it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from tests.norms.cases import CHANNELS, FROZEN, set_statistics
from tests.reference.data import fill, values

SHAPE = (3, CHANNELS, 4, 2)


def test_training_does_not_move_the_statistics() -> None:
    norm = FROZEN.build(SHAPE)
    before = norm.running_mean.clone()
    norm(values(*SHAPE))
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0


def test_train_and_eval_agree_to_the_bit() -> None:
    norm, x = FROZEN.build(SHAPE), values(*SHAPE)
    assert torch.equal(norm.train()(x), norm.eval()(x))


def test_a_built_one_asks_for_no_gradients() -> None:
    norm = normswap.build("frozen_bn", CHANNELS)
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_requires_grad_does_not_thaw_it() -> None:
    norm = FROZEN.build(SHAPE).requires_grad_()
    norm(values(*SHAPE).requires_grad_()).sum().backward()
    assert norm.weight.grad is None
    assert norm.bias.grad is None


def test_its_state_has_the_keys_of_a_batch_norm() -> None:
    frozen = normswap.build("frozen_bn", CHANNELS)
    assert list(frozen.state_dict()) == list(nn.BatchNorm2d(CHANNELS).state_dict())


def test_a_batch_norms_checkpoint_makes_it_that_batch_norm() -> None:
    trained = set_statistics(fill(nn.BatchNorm2d(CHANNELS))).eval()
    frozen = normswap.build("frozen_bn", CHANNELS).double()
    frozen.load_state_dict(trained.state_dict())
    x = values(*SHAPE)
    assert torch.equal(frozen(x), trained(x))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check: object) -> None:
    norm = FROZEN.build(SHAPE)
    assert check(norm, (values(2, CHANNELS, 3).requires_grad_(),))  # type: ignore[operator]
