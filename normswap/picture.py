"""The one way normswap draws pictures: panels side by side, told by what they show."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from normswap.errors import MissingExtra, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

__all__ = ["FAINT", "FRAME", "INK", "OURS", "PLAIN", "Panel", "draw", "draw_panel", "save", "sheet"]

# From Okabe and Ito's palette, which stays apart under every common colour blindness. The three
# also differ in lightness, for print without colour.
PLAIN = "#E69F00"
BETWEEN = "#009E73"
OURS = "#0072B2"
INK = "#222222"
FAINT = "#767676"
FRAME = "#CCCCCC"

DASHES = (0, (4, 3))
#: Colours of series, what is read best on each, and marks.
COLORS = (PLAIN, BETWEEN, OURS)
ON = (INK, INK, "white")
MARKERS = ("D", "s", "o")
#: Which of these one series, two and three have.
SERIES = {1: (2,), 2: (0, 2), 3: (0, 1, 2)}

#: How much of its place the bars at one place take together.
FULL = 0.84
#: More numbers than this are neither written nor marked, and more than the second stand upright.
MOST_VALUES = 24
MOST_LEVEL = 8
#: Of the panel's height, from where on a bar has room for its value.
TALL = 0.4
#: More places than this are not all named; more letters than this do not stand in a line.
MOST_NAMES = 80
MOST_LETTERS = 45
#: Fewer places than this do not fill the width.
FEWEST_PLACES = 4
#: Letters of a title in an inch.
LETTERS = 9


@dataclass(frozen=True)
class Panel:
    """What one panel shows: one to three series of numbers, over the same places.

    Args:
        title: a line above; may be empty.
        x: what the places are, with their unit.
        y: what the numbers are, with their unit.
        series: by label one number a place; the plainer ones first.
        kind: how they are drawn.
        places: where they are on the x axis. Default: 0, 1, 2, ...
        names: what the places are called. Default: numbers.
        rules: by label the height of a dashed line across.
        base: where bars begin.
        log: the axes that are logarithmic: any of ``"x"`` and ``"y"``.
        percent: whether the numbers are percentages of a whole, from 0 to 100.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[float]]
    kind: Literal["bars", "line"] = "bars"
    places: Sequence[float] = ()
    names: Sequence[str] = ()
    rules: Mapping[str, float] = field(default_factory=dict)
    base: float = 0.0
    log: str = ""
    percent: bool = False


def draw(path: str | os.PathLike[str], columns: Sequence[Sequence[Panel]], *, title: str) -> None:
    """Draw panels into a file.

    Args:
        path: where the picture goes; its ending says the format, such as ``.png`` or ``.svg``.
        columns: side by side; the panels of a column stand one above the other, over the same
            places.
        title: a line above all.

    Raises:
        MissingExtra: matplotlib is not installed.
        OptionError: the picture cannot be written there.
    """
    widths = [min(18.0, max(5.0, 0.17 * len(column[-1].names))) for column in columns]
    longest = max((len(name) for column in columns for name in column[-1].names), default=0)
    figure, parts = sheet(title, widths=widths, height=4.8 + 0.06 * longest)
    for part, column in zip(parts, columns, strict=True):
        stack = part.subplots(len(column), 1, sharex=True, squeeze=False)
        for axes, panel in zip(stack.flat, column, strict=True):
            draw_panel(axes, panel)
            axes.label_outer()
    save(figure, path)


def sheet(title: str, *, widths: Sequence[float], height: float) -> tuple[Figure, list[SubFigure]]:
    """An empty sheet with a title, and its parts side by side.

    Args:
        title: a line above all.
        widths: of each part, in inches.
        height: of the sheet, in inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            'pictures need matplotlib, not installed here; get it by: pip install "normswap[plot]"'
        ) from None
    # A figure of its own, not pyplot's: no window, and none of the caller's settings change.
    figure = Figure(figsize=(sum(widths), height), dpi=150, layout="constrained", facecolor="white")
    title = textwrap.fill(title, int(LETTERS * sum(widths)))
    figure.suptitle(title, fontsize=13, color=INK)
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths, wspace=0.04)
    return figure, [figure.add_subfigure(grid[0, column]) for column in range(len(widths))]


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure into a file; one that is there is replaced.

    Raises:
        OptionError: the ending says no known format, or the file cannot be written.
    """
    ending = Path(path).suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise OptionError(
            f"{os.fspath(path)!r} does not say by its ending what picture it is to be; give one "
            f"of {', '.join(f'.{kind}' for kind in sorted(known))}"
        )
    try:
        figure.savefig(path, format=ending)
    except OSError as error:
        raise OptionError(f"the picture cannot be written: {error}") from None


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one panel."""
    axes.set(**{f"{letter}scale": "log" for letter in panel.log})
    axes.margins(y=0.1)
    for index, (label, values) in enumerate(panel.series.items()):
        own = SERIES[len(panel.series)][index]
        color = COLORS[own]
        if panel.kind == "line":
            places = panel.places or range(len(values))
            marker = MARKERS[own] if len(values) <= MOST_VALUES else None
            axes.plot(places, values, color=color, marker=marker, markersize=4, label=label)
        else:
            heights = [value - panel.base for value in values]
            places, width = _bars(panel, index)
            axes.bar(places, heights, 0.93 * width, panel.base, color=color, label=label)
    for label, height in panel.rules.items():
        axes.axhline(height, color=INK, linewidth=1, linestyle=DASHES, zorder=1.5, label=label)
    _frame(axes, panel)
    if panel.kind == "bars" and sum(map(len, panel.series.values())) <= MOST_VALUES:
        for index, values in enumerate(panel.series.values()):
            _write_values(axes, panel, index, values)


def _bars(panel: Panel, index: int) -> tuple[list[float], float]:
    """Where the bars of a series stand, and how wide they are."""
    count = len(panel.series)
    places = panel.places or range(len(next(iter(panel.series.values()))))
    width = FULL / count
    return [place + (index - (count - 1) / 2) * width for place in places], width


def _write_values(axes: Axes, panel: Panel, index: int, values: Sequence[float]) -> None:
    """Write values inside tall bars, where no rule runs through them, and beyond others."""
    on_bar = ON[SERIES[len(panel.series)][index]]
    for place, value in zip(_bars(panel, index)[0], values, strict=True):
        start, end = axes.transData.transform([(place, panel.base), (place, value)])[:, 1]
        inside, up = bool(abs(end - start) > TALL * axes.bbox.height), value >= panel.base
        axes.annotate(
            f"{value:.1f}%" if panel.percent else f"{value:.4g}",
            (place, value),
            xytext=(0, -4 if inside == up else 3),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="top" if inside == up else "bottom",
            rotation=0 if len(values) * len(panel.series) <= MOST_LEVEL else 90,
            fontsize=8.5,
            color=on_bar if inside else INK,
        )


def _frame(axes: Axes, panel: Panel) -> None:
    """Say what the panel shows: title, legend, axes."""
    told = len(panel.rules) + len(panel.series) if len(panel.series) > 1 else len(panel.rules)
    if panel.title:
        axes.set_title(panel.title, fontsize=11, color=INK, pad=8 + 14 * told)
    if told:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            fontsize=9,
            frameon=False,
            borderaxespad=0.2,
            labelspacing=0.25,
            labelcolor=INK,
        )
    axes.set_xlabel(panel.x, color=INK)
    axes.set_ylabel(panel.y, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FRAME, linewidth=0.6)
    axes.set_axisbelow(True)
    for letter in panel.log:
        _tick_plainly({"x": axes.xaxis, "y": axes.yaxis}[letter])
    if panel.percent:
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 20), [f"{value}%" for value in range(0, 101, 20)])
    if panel.names:
        _name_places(axes, panel)


def _name_places(axes: Axes, panel: Panel) -> None:
    places = panel.places or range(len(panel.names))
    step = -(-len(places) // MOST_NAMES)
    level = sum(len(name) + 2 for name in panel.names) <= MOST_LETTERS
    axes.set_xticks(
        places[::step],
        panel.names[::step],
        rotation=0 if level else 90,
        fontsize=9 if len(places) <= MOST_VALUES else 7,
    )
    axes.tick_params(axis="x", length=0)
    room = max(0.6, (FEWEST_PLACES - len(places)) / 2)
    axes.set_xlim(places[0] - room, places[-1] + room)


def _tick_plainly(axis: Axis) -> None:
    """Numbers like 0.2 and 5,000 on a logarithmic axis, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(
        MaxNLocator(5)
        if high < 10 * low
        else LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
