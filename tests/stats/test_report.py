"""What a warm-up tells of itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap.picture import Panel
from normswap.progress import rate
from tests.stats.models import cut, images, net


def test_every_norm_has_a_row() -> None:
    model = net()
    model[5].eval()
    report = normswap.warmup(model, cut(images(6), [4, 2]))
    assert sorted(row.path for row in report) == ["1", "5"]
    assert [row.path for row in report.estimated] == ["1"]
    assert [row.path for row in report.left] == ["5"]


def test_calls_batches_and_samples_are_counted() -> None:
    shared = nn.BatchNorm2d(2).double()
    report = normswap.warmup(nn.Sequential(shared, shared), cut(images(6), [4, 2]))
    assert (report.batches, report.samples, report.skipped) == (2, 6, 0)
    assert report[0].calls == 4
    assert report.seconds > 0


@pytest.mark.parametrize("method", ["pooled", "average", "ema"])
def test_the_method_is_named(method: str) -> None:
    report = normswap.warmup(net(), [images(6)], method=method)
    assert report.method == method
    assert method in str(report)


def test_the_shift_is_in_new_deviations() -> None:
    norm = nn.BatchNorm2d(2).double()
    data = images(50)
    (row,) = normswap.warmup(norm, [data])
    mean, var = data.mean((0, 2, 3)), data.transpose(0, 1).flatten(1).var(1)
    assert row.mean_shift == pytest.approx((mean.square() / var).mean().sqrt().item())
    assert row.var_ratio == pytest.approx(var.log().mean().exp().item())


def test_a_second_pass_over_the_same_data_moves_nothing() -> None:
    norm = nn.BatchNorm2d(2).double()
    normswap.warmup(norm, [images(6)])
    (row,) = normswap.warmup(norm, [images(6)])
    assert row.mean_shift == pytest.approx(0, abs=1e-12)
    assert row.var_ratio == pytest.approx(1)


def test_a_variance_of_zero_is_no_obstacle() -> None:
    (row,) = normswap.warmup(nn.BatchNorm2d(2), [torch.ones(4, 2, 3, 3)])
    assert row.status == "estimated"


def test_it_prints_paths_reasons_and_skipped_batches() -> None:
    model = net()
    model[5].eval()
    spoilt = images(4) * float("nan")
    printed = str(normswap.warmup(model, [images(6), spoilt], on_nonfinite="skip"))
    for text in ("estimated", "frozen", "6 samples", "1 batches skipped"):
        assert text in printed


def test_a_norm_that_is_the_model_is_named_in_words() -> None:
    assert "the model itself" in str(normswap.warmup(nn.BatchNorm2d(2).double(), [images(6)]))


def test_the_throughput_is_told() -> None:
    report = normswap.warmup(net(), cut(images(6), [4, 2]))
    assert report.samples_per_second == pytest.approx(6 / report.seconds)
    assert rate(report.samples_per_second, "samples") in str(report)


def test_everything_is_in_a_mapping_that_json_can_hold() -> None:
    model = net()
    model[5].eval()
    report = normswap.warmup(model, cut(images(90), [3] * 30), tol=1e9)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["method"] == "pooled"
    assert told["samples"] == told["samples_needed"] == report.samples
    assert told["batches"] == report.batches
    assert told["skipped"] == 0
    assert told["tol"] == 1e9
    assert told["seconds"] == report.seconds
    assert told["samples_per_second"] == report.samples_per_second
    assert [row["path"] for row in told["norms"]] == ["1", "5"]
    assert told["norms"][0]["mean_shift"] == report[0].mean_shift
    assert told["norms"][1]["var_ratio"] is None
    assert told["convergence"] == [asdict(point) for point in report.convergence]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null_in_strict_json(value: float) -> None:
    norm = nn.BatchNorm2d(2)
    for old in (norm.running_mean, norm.running_var):
        old.fill_(value)
    report = normswap.warmup(norm, cut(images(6).float(), [4, 2]), tol=float("inf"))
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    (row,) = told["norms"]
    assert (row["mean_shift"], row["var_ratio"], told["tol"]) == (
        None,
        None if value != value else 0,
        None,
    )
    assert torch.isfinite(norm.running_var).all()


def test_a_tolerance_that_was_met_or_not_is_told() -> None:
    data = cut(images(90), [3] * 30)
    met, not_met = normswap.warmup(net(), data, tol=0.9), normswap.warmup(net(), data, tol=1e-9)
    assert met.samples_needed == met.samples < 90
    assert f"known to 0.9 after {met.samples} samples" in met.summary()
    assert not_met.samples_needed is None
    last = not_met.convergence[-1]
    assert f"not known to 1e-09: {last.worst} only to {last.error:.2g}" in not_met.summary()
    assert "too few batches" in normswap.warmup(net(), data[:3], tol=0.9).summary()
    assert "known" not in normswap.warmup(net(), data).summary()


class TestPicture:
    """What `WarmupReport.plot` draws."""

    @pytest.fixture(autouse=True)
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[list[list[Panel]]]:
        """Every call's columns of panels."""
        calls: list[list[list[Panel]]] = []
        monkeypatch.setattr(
            "normswap.stats.report.draw", lambda path, columns, title: calls.append(columns)
        )
        return calls

    def test_drift_and_convergence(self, drawn: list[list[list[Panel]]]) -> None:
        report = normswap.warmup(net(), cut(images(90), [3] * 30), tol=1e-9)
        report.plot("x.png")
        ((means, ratios), (convergence,)) = drawn[0]
        assert list(means.names) == list(ratios.names) == ["1", "5"]
        assert list(means.series.values()) == [[row.mean_shift for row in report]]
        assert list(ratios.series.values()) == [[row.var_ratio for row in report]]
        assert (ratios.base, ratios.log) == (1, "y")
        assert list(convergence.places) == [point.samples for point in report.convergence]
        assert list(convergence.series.values()) == [
            [point.var_error for point in report.convergence],
            [point.mean_error for point in report.convergence],
        ]
        assert list(convergence.rules.values()) == [1e-9]

    def test_norms_that_were_left_are_left_out(self, drawn: list[list[list[Panel]]]) -> None:
        model = net()
        model[1].eval()
        normswap.warmup(model, [images(6)]).plot("x.png")
        assert [list(panel.names) for panel in drawn[0][0]] == [["5"], ["5"]]

    def test_where_nothing_is_known_of_convergence_it_is_left_out(
        self, drawn: list[list[list[Panel]]]
    ) -> None:
        normswap.warmup(net(), cut(images(90), [3] * 30), method="population").plot("x.png")
        assert len(drawn[0]) == 1


def test_the_picture_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "warmup.png"
    normswap.warmup(net(), cut(images(90), [3] * 30), tol=1e-9).plot(target)
    assert target.read_bytes().startswith(b"\x89PNG")
