from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torch
from typer.testing import CliRunner

from normswap import cli
from normswap.demo import experiments
from normswap.demo.digits import load_digits
from normswap.demo.experiments import run
from normswap.demo.result import DemoResult
from normswap.demo.settings import QUICK, Settings
from normswap.picture import BETWEEN, OURS, PLAIN
from normswap.views.demo import draw_demo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run(QUICK)


def test_revert_gives_back_the_very_same_network(result: DemoResult) -> None:
    trip = result.round_trip
    assert trip.reverted == trip.original
    assert trip.bit_equal


def test_what_is_measured_hangs_together(result: DemoResult) -> None:
    assert [epoch.steps for epoch in result.epochs] == [8, 16]
    assert (result.train_size, result.test_size) == (256, 200)
    # The same network, warmed up once more: by the last epoch and before the conversions.
    assert result.epochs[-1].warmed == result.round_trip.original
    default = next(row for row in result.groups if row.asked is None)
    assert default.matched == result.round_trip.converted
    assert [row.used for row in result.groups if row.asked] == [(1,), (8,), (32,)]


def test_warm_up_matching_and_calibration_are_worth_it(result: DemoResult) -> None:
    assert result.epochs[-1].warmed > result.epochs[-1].running + 0.2
    for row in result.groups:
        assert row.matched > row.copied + 0.2
        assert row.calibrated > row.copied + 0.2
        assert 0 < row.calibrated_error < row.matched_error


def test_the_table_shows_every_way_to_convert(result: DemoResult) -> None:
    table = str(result).split("\n\n2. ")[1].splitlines()
    for row in result.groups:
        (line,) = [line for line in table if line.startswith(f" {row.label} ")]
        assert line.removeprefix(f" {row.label}").split() == [
            f"{row.copied:.1%}",
            f"{row.matched:.1%}",
            f"{row.calibrated:.1%}",
            f"{row.matched_error:.2f}",
            "→",
            f"{row.calibrated_error:.2f}",
        ]


def test_the_command_measures_the_very_same_again_and_draws_it(
    result: DemoResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again: list[DemoResult] = []

    def kept_run(settings: Settings) -> DemoResult:
        again.append(run(settings))
        return again[0]

    monkeypatch.setattr(experiments, "run", kept_run)
    target = tmp_path / "demo.png"
    before = torch.get_rng_state()
    ran = CliRunner().invoke(
        cli.app, ["demo", "--quick", "--out", str(target)], catch_exceptions=False
    )
    assert ran.exit_code == 0
    assert again == [result]
    assert torch.equal(torch.get_rng_state(), before)
    assert str(again[0]) in ran.stdout
    assert f"Picture: {target}" in ran.stdout
    assert "Time: " in ran.stdout
    assert is_a_picture(target)


def test_digits_are_split_once_and_for_all() -> None:
    digits, again = load_digits(), load_digits(most_train=100, most_test=50)
    images, labels = digits.test.tensors
    assert images.shape == (500, 1, 32, 32)
    assert len(digits.train) == 1297
    assert images.min() == 0
    assert images.max() == 1
    assert labels.bincount().min() >= 45
    assert torch.equal(again.test.tensors[0], images[:50])
    assert torch.equal(again.train.tensors[1], digits.train.tensors[1][:100])


def test_a_picture_of_many_epochs_and_few_samples(tmp_path: Path) -> None:
    target = tmp_path / "many.png"
    draw_demo(
        target,
        title="many",
        epochs=[(0.1, 0.9)] * 30,
        groups=[("1", (0.0, 0.5, 1.0))],
        original=1.0,
        reverted=1.0,
        samples=[([[0.0, 1.0], [1.0, 0.0]], 1, 2)],
    )
    assert is_a_picture(target)


def test_every_way_to_convert_has_its_bar(tmp_path: Path) -> None:
    flat = bars_drawn(tmp_path / "flat.png", (0.0, 0.0, 0.0))
    for side, name in enumerate(("copied", "matched", "calibrated")):
        high: list[float] = [0.0] * 3
        high[side] = 1.0
        drawn = bars_drawn(tmp_path / f"{name}.png", high)
        assert [more > less + 10_000 for less, more in zip(flat, drawn, strict=True)] == [
            height == 1.0 for height in high
        ]


def bars_drawn(path: Path, shares: Sequence[float]) -> list[int]:
    """How many pixels of a picture of these bars have each series' colour."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    draw_demo(
        path,
        title="bars",
        epochs=[(0.0, 0.0)],
        groups=[("1", shares)],
        original=1.0,
        reverted=1.0,
        samples=[([[1.0]], 1, 2)],
    )
    pixels = imread(path)[..., :3]
    return [
        int((abs(pixels - to_rgb(color)).max(axis=-1) < 0.01).sum())
        for color in (PLAIN, BETWEEN, OURS)
    ]


def is_a_picture(path: Path) -> bool:
    """A PNG of a README's size, with more in it than one colour."""
    from matplotlib.image import imread

    pixels = imread(path)
    return (
        path.read_bytes().startswith(PNG)
        and pixels.shape[0] > 500
        and pixels.shape[1] > 1000
        and float(pixels.std()) > 0.05
    )
