"""Which norms a warm-up is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import NothingMatched, StatisticsError
from tests.reference.footprint import footprint
from tests.stats.models import CHANNELS, cut, images, net


def estimated(model: nn.Module, **arguments: Any) -> list[str]:
    report = normswap.warmup(model, cut(images(6), [4, 2]), **arguments)
    return [row.path for row in report.estimated]


def why_left(model: nn.Module, **arguments: Any) -> dict[str, str]:
    report = normswap.warmup(model, cut(images(6), [4, 2]), **arguments)
    return {row.path: row.status for row in report.left}


def with_first(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    """A net in train mode with something done to its first norm."""
    model = net()
    change(model)
    return model


def hold_in_eval(model: nn.Sequential) -> None:
    model[1].eval()


def stop_momentum(model: nn.Sequential) -> None:
    model[1].momentum = 0


def freeze_by_class(model: nn.Sequential) -> None:
    normswap.convert(model, "frozen_bn", where="1")


def stop_tracking(model: nn.Sequential) -> None:
    model[1].track_running_stats = False


FREEZES = {
    hold_in_eval: "in eval mode while others train",
    stop_momentum: "momentum=0",
    freeze_by_class: "by its class",
    stop_tracking: "track_running_stats",
}
each_freeze = pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: freeze.__name__)


def test_of_a_training_model_all_are_estimated() -> None:
    assert estimated(net().train()) == ["1", "5"]


def test_of_a_model_in_eval_mode_all_are_estimated() -> None:
    assert estimated(net().eval()) == ["1", "5"]


@each_freeze
def test_what_is_frozen_is_left(freeze: Callable[[nn.Sequential], None]) -> None:
    model = with_first(freeze)
    before = footprint(model[1])
    assert estimated(model) == ["5"]
    assert footprint(model[1]) == before


@each_freeze
def test_what_is_frozen_is_reported_with_the_reason(
    freeze: Callable[[nn.Sequential], None],
) -> None:
    left = why_left(with_first(freeze))
    assert list(left) == ["1"]
    assert "frozen" in left["1"]
    assert FREEZES[freeze] in left["1"]


def test_a_frozen_norm_normalizes_by_what_it_keeps() -> None:
    model = with_first(hold_in_eval)
    frozen_output = model[1](model[0](images(6)))
    normswap.warmup(model, [images(6)])
    expected = nn.BatchNorm2d(CHANNELS, momentum=1.0).double()
    expected(model[4](frozen_output.clamp(min=0)))
    assert (model[5].running_mean - expected.running_mean).abs().max() < 1e-10


@pytest.mark.parametrize("freeze", [hold_in_eval, stop_momentum])
def test_where_overrides_a_freeze(freeze: Callable[[nn.Sequential], None]) -> None:
    assert estimated(with_first(freeze), where="1") == ["1"]


def test_where_chooses_and_the_rest_is_reported() -> None:
    assert why_left(net(), where="5") == {"1": "not in where="}


@pytest.mark.parametrize(
    "where", ["?", "re:[15]", "kind:batch_norm", nn.BatchNorm2d, ["1", "5"], lambda site: True]
)
def test_where_takes_every_selector(where: Any) -> None:
    assert estimated(net(), where=where) == ["1", "5"]


def test_where_that_matches_nothing_is_refused() -> None:
    with pytest.raises(NothingMatched, match="where='layer1'"):
        normswap.warmup(net(), [images(4)], where="layer1")


def test_where_cannot_choose_what_never_measures() -> None:
    with pytest.raises(StatisticsError, match="frozen by its class"):
        normswap.warmup(with_first(freeze_by_class), [images(4)], where="1")


def test_a_model_whose_norms_are_all_frozen_is_refused() -> None:
    model = normswap.convert(net(), "frozen_bn")
    with pytest.raises(StatisticsError, match="is frozen"):
        normswap.warmup(model, [images(4)])


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.InstanceNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.Identity(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_model_without_running_statistics_is_refused_untouched(norm: nn.Module) -> None:
    before = footprint(norm)
    with pytest.raises(StatisticsError, match="keeps running statistics"):
        normswap.warmup(nn.Sequential(norm), [images(4)])
    assert footprint(norm) == before


def test_norms_without_running_statistics_are_not_spoken_of() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm2d(2)).double()
    report = normswap.warmup(model, [images(4)])
    assert [row.path for row in report] == ["1"]


def test_a_norm_that_was_not_reached_is_left_and_reported() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm2d(2), "unused": nn.BatchNorm2d(2)}).double()
    before = footprint(model["unused"])
    report = normswap.warmup(
        model, cut(images(6), [4, 2]), forward=lambda model, x: model["used"](x)
    )
    assert [(row.path, row.status) for row in report.left] == [
        ("unused", "not reached by the forward")
    ]
    assert footprint(model["unused"]) == before
    assert model["used"].num_batches_tracked == 2


def test_one_object_under_two_names_is_one_row() -> None:
    shared = nn.BatchNorm2d(2).double()
    assert estimated(nn.Sequential(shared, shared)) == ["0"]


def test_what_keeps_something_else_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model.append(nn.BatchNorm2d(4))
    normswap.convert(model, "evonorm_b0", where="1")
    report = normswap.warmup(model, [torch.randn(4, 3, 5, 5)], progress=False)
    assert any(row.path == "1" and "only training updates it" in str(row) for row in report)
