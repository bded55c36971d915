"""The pictures: what is drawn, where it goes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import itertools

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normswap.errors import MissingExtra, OptionError
from normswap.picture import Panel, draw, draw_panel

FEW = Panel("few", "places", "heights", {"one": [1, 2]}, names=["a", "b"])


def drawn(panel: Panel) -> Axes:
    """Axes with the panel, laid out as in a file."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw_panel(axes, panel)
    figure.draw_without_rendering()
    return axes


def bars(axes: Axes) -> list[tuple[float, float]]:
    """Where each bar begins and ends."""
    return [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]


def names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_bars_are_as_high_as_the_numbers_and_named() -> None:
    axes = drawn(FEW)
    assert bars(axes) == [(0, 1), (0, 2)]
    assert names(axes) == ["a", "b"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("few", "places", "heights")


def test_bars_of_ratios_begin_at_one() -> None:
    axes = drawn(Panel("", "", "", {"ratio": [0.5, 4]}, base=1, log="y"))
    assert bars(axes) == [(1, 0.5), (1, 4)]
    assert axes.get_yscale() == "log"


def test_two_series_stand_side_by_side_with_a_legend() -> None:
    axes = drawn(Panel("", "", "", {"before": [1, 2], "after": [3, 4]}, rules={"goal": 2.5}))
    before, after = axes.containers
    for one, other in zip(before, after, strict=True):
        assert one.get_x() + one.get_width() <= other.get_x()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "before",
        "after",
        "goal",
    }


def test_one_series_needs_no_legend() -> None:
    assert drawn(FEW).get_legend() is None


def test_few_values_are_written_in_tall_bars_and_above_small_ones() -> None:
    axes = drawn(Panel("", "", "", {"share": [5, 95]}, percent=True))
    small, tall = axes.texts
    assert (small.get_text(), tall.get_text()) == ("5.0%", "95.0%")
    heights = [axes.transData.inverted().transform(t.get_window_extent()) for t in axes.texts]
    assert heights[0][0][1] > 5
    assert heights[1][1][1] < 95


def test_many_places_are_not_all_written_but_none_overlap() -> None:
    many = [f"layer{index}.norm" for index in range(200)]
    axes = drawn(Panel("", "", "", {"one": [1.0] * 200}, names=many))
    assert not axes.texts
    assert 40 < len(names(axes)) <= 80
    assert names(axes)[0] == many[0]


def test_names_on_a_wide_sheet_do_not_touch(tmp_path: Path, monkeypatch: Any) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("normswap.picture.save", lambda figure, path: figures.append(figure))
    many = [f"layer{index}.0.downsample.1" for index in range(53)]
    draw(tmp_path / "x.png", [[Panel("", "", "", {"one": [1.0] * 53}, names=many)]], title="")
    figures[0].draw_without_rendering()
    (axes,) = figures[0].axes
    extents = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(extents) == 53
    for left, right in itertools.pairwise(extents):
        assert left.x1 <= right.x0


def test_a_line_on_logarithmic_axes_goes_through_its_points() -> None:
    panel = Panel("", "", "", {"error": [0.2, 0.1]}, kind="line", places=[10, 40], log="xy")
    axes = drawn(panel)
    line = axes.lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 40], [0.2, 0.1])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    inside = [t for t in axes.get_yticks() if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    assert len(inside) >= 2


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_ending_says_the_format(tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"picture.{ending}"
    draw(target, [[FEW, FEW], [FEW]], title="a title " * 30)
    start = target.read_bytes()[:200]
    assert {"png": b"PNG", "svg": b"<svg", "pdf": b"%PDF"}[ending] in target.read_bytes()[:2000]
    assert start


@pytest.mark.parametrize("name", ["picture", "picture.doc", "nowhere/picture.png"])
def test_a_place_that_no_picture_can_go_to_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError):
        draw(tmp_path / name, [[FEW]], title="")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_way_to_get_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"matplotlib.*normswap\[plot\]"):
        draw(tmp_path / "picture.png", [[FEW]], title="")


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    code = (
        "import sys, normswap, normswap.picture; normswap.warmup; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
