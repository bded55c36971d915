"""What is told: plans before, reports after, and one warning in between."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
from torch import nn

import normswap
from tests.swap.helpers import CHANNELS, COPIES, NormReLU, batch_net, filled


def mixed() -> nn.ModuleDict:
    """Norms to convert, to leave and to skip, one of them under two names."""
    model = nn.ModuleDict(
        {"a": batch_net(), "b": nn.GroupNorm(2, CHANNELS), "c": filled(NormReLU(CHANNELS))}
    )
    model["again"] = model["a"][1]
    return model


# -- plans --------------------------------------------------------------------------------------


def test_a_plan_has_a_step_for_every_norm() -> None:
    plan = normswap.plan(mixed(), "sync_bn")
    assert [(step.site.path, step.action) for step in plan] == [
        ("a.1", "convert"),
        ("b", "leave"),
        ("c", "skip"),
    ]
    assert len(plan) == 3
    assert plan[0].site.aliases == ("again",)
    assert plan[0].fidelity == "exact"
    assert "overrides the forward" in plan[2].reason


def test_a_plan_prints_a_table() -> None:
    text = str(normswap.plan(mixed(), "gn", num_groups=4))
    for part in ("a.1", "BatchNorm2d", "convert", "gn(num_groups=4)", "matched", "4 groups of 2"):
        assert part in text
    for part in ("c", "NormReLU", "skip", "overrides the forward of BatchNorm2d"):
        assert part in text
    assert "2 convert, 1 skip" in text


def test_a_plan_of_a_model_that_is_a_norm_prints_a_table() -> None:
    assert "(the model itself)" in str(normswap.plan(nn.BatchNorm2d(8), "gn"))


def test_a_second_plan_says_what_is_done_already() -> None:
    model = normswap.convert(batch_net(), "gn")
    (step,) = normswap.plan(model, "gn")
    assert step.action == "already"


def test_apply_makes_a_plan_happen() -> None:
    model = batch_net()
    assert normswap.plan(model, "gn").apply() is model
    assert isinstance(model[1], nn.GroupNorm)


def test_the_order_of_the_plan_is_the_order_of_the_modules() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(8) for _ in range(12)))
    assert [step.site.path for step in normswap.plan(model, "gn")] == [str(i) for i in range(12)]


# -- reports ------------------------------------------------------------------------------------


def converted() -> nn.ModuleDict:
    model = mixed()
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(model, "gn", where="*", num_groups=4)
    return model


def test_a_report_has_a_row_for_all_that_was_done_or_skipped() -> None:
    rows = {row.path: row for row in normswap.report(converted())}
    assert rows.keys() == {"a.1", "b", "c"}
    done = rows["a.1"]
    assert (done.source, done.to, done.fidelity) == ("BatchNorm2d", "gn(num_groups=4)", "matched")
    assert done.reason == "4 groups of 2"
    skipped = rows["c"]
    assert (skipped.source, skipped.to, skipped.fidelity) == ("NormReLU", "gn(num_groups=4)", None)
    assert "overrides the forward of BatchNorm2d" in skipped.reason


def test_a_report_prints_a_table() -> None:
    text = str(normswap.report(converted()))
    for part in ("a.1", "BatchNorm2d", "gn(num_groups=4)", "matched", "skipped"):
        assert part in text
    assert "2 converted, 1 skipped" in text


def test_a_report_leads_back_to_the_first_original() -> None:
    model = normswap.convert(normswap.convert(batch_net(), "sync_bn"), "gn")
    (row,) = normswap.report(model)
    assert (row.source, row.to) == ("BatchNorm2d", "gn")


@pytest.mark.parametrize("way", COPIES)
def test_a_report_goes_with_copies(way: str) -> None:
    model = nn.ModuleDict({"a": batch_net()})
    normswap.convert(model, "gn")
    assert list(normswap.report(COPIES[way](model))) == list(normswap.report(model))


def test_the_report_of_an_unconverted_model_is_empty() -> None:
    assert list(normswap.report(mixed())) == []


def test_a_skip_is_forgotten_once_the_site_was_converted() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 1), nn.SyncBatchNorm(8))
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(model, "bn")
    assert [row.fidelity for row in normswap.report(model)] == ["exact", None]
    normswap.convert(model, "frozen_bn")
    assert [(row.path, row.to) for row in normswap.report(model)] == [
        ("0", "frozen_bn"),
        ("2", "frozen_bn"),
    ]


def test_a_report_says_that_a_frozen_norm_trains_again() -> None:
    model = normswap.convert(normswap.convert(batch_net(), "frozen_bn"), "bn")
    assert "frozen" in normswap.report(model)[0].reason


# -- warnings -----------------------------------------------------------------------------------


def warned(model: nn.Module, to: str, **arguments: object) -> str:
    """The text of the one warning of a conversion, which points at the line of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        normswap.convert(model, to, **arguments)
    (warning,) = caught
    assert warning.category is normswap.NormSwapWarning
    assert (warning.filename, warning.lineno) == (__file__, line)
    return str(warning.message)


def test_one_warning_for_all_that_was_skipped() -> None:
    model = batch_net(NormReLU(8), NormReLU(8))
    text = warned(model, "sync_bn")
    assert "2 were skipped" in text
    assert "2 (NormReLU)" in text
    assert "overrides the forward" in text
    assert "report" in text


def test_one_warning_for_all_that_starts_fresh() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    text = warned(model, "identity")
    assert "2 start with nothing carried" in text
    assert "0 (BatchNorm2d)" in text


def test_one_warning_for_both() -> None:
    text = warned(batch_net(NormReLU(8)), "identity")
    assert "1 were skipped" in text
    assert "1 start with nothing carried" in text


def test_no_warning_for_a_fresh_start_that_was_asked_for() -> None:
    normswap.convert(batch_net(), "gn", carry="fresh")


def test_no_warning_for_what_was_left_out() -> None:
    normswap.convert(batch_net(NormReLU(8)), "gn", skip="2")


def test_no_warning_from_a_plan() -> None:
    normswap.plan(batch_net(NormReLU(8)), "identity")


def test_the_context_manager_warns_at_the_line_of_the_block() -> None:
    model = batch_net(NormReLU(8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        with normswap.converted(model, "gn"):
            pass
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_copy_warns_as_well() -> None:
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(copy.deepcopy(mixed()), "gn", inplace=False)
