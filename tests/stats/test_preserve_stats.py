"""``preserve_stats``: whatever happens inside, running statistics are as before outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from tests.reference.footprint import footprint
from tests.stats.models import images, net


def test_a_forward_in_train_mode_is_undone() -> None:
    model = net()
    before = footprint(model)
    with normswap.preserve_stats(model):
        model(images(4))
        assert footprint(model) != before
    assert footprint(model) == before


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_an_exception_undoes_it_too(error: type[BaseException]) -> None:
    def adapt_and_fail(model: nn.Module) -> None:
        with normswap.preserve_stats(model):
            model(images(4))
            raise error

    model = net()
    before = footprint(model)
    with pytest.raises(error):
        adapt_and_fail(model)
    assert footprint(model) == before


def test_a_warmup_is_undone() -> None:
    model = net()
    before = footprint(model)
    with normswap.preserve_stats(model):
        normswap.warmup(model, [images(4)])
    assert footprint(model) == before


def test_parameters_may_change() -> None:
    model = net()
    with normswap.preserve_stats(model), torch.no_grad():
        model[1].weight.fill_(7.0)
    assert (model[1].weight == 7).all()


def test_the_model_is_given() -> None:
    model = net()
    with normswap.preserve_stats(model) as given:
        assert given is model


def test_an_instance_norm_is_covered() -> None:
    model = nn.InstanceNorm2d(2, track_running_stats=True).double()
    before = footprint(model)
    with normswap.preserve_stats(model):
        model(images(4))
    assert footprint(model) == before


def test_a_model_without_statistics_is_no_obstacle() -> None:
    with normswap.preserve_stats(nn.Linear(2, 2)):
        pass


def test_statistics_survive_a_move_to_another_precision() -> None:
    model = net().float()
    with normswap.preserve_stats(model):
        model.double()(images(4))
    assert (model[1].running_mean == 0).all()
    assert (model[1].running_var == 1).all()


def test_blocks_may_be_nested() -> None:
    model = net()
    outer = footprint(model)
    with normswap.preserve_stats(model):
        model(images(4))
        inner = footprint(model)
        with normswap.preserve_stats(model):
            model(images(4, seed=1))
        assert footprint(model) == inner
    assert footprint(model) == outer
