"""The demo's picture: what a warm-up, a fitted start and a revert are worth, in three panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["draw_demo"]

# From Okabe and Ito's palette, which stays apart under every common colour blindness. The three
# also differ in lightness, for print without colour.
PLAIN = "#E69F00"
MATCHED = "#009E73"
OURS = "#0072B2"
INK = "#222222"
#: What is read best on each colour.
ON = {PLAIN: INK, MATCHED: INK, OURS: "white"}
FAINT = "#767676"
FRAME = "#CCCCCC"

BARS = 0.9
GAP = 0.02
MOST_LABELLED = 24
MOST_TICKS = 10
TALL = 50
SAMPLE_COLUMNS = 4

Pixels = Sequence[Sequence[float]]
Shares = Sequence[float]


def draw_demo(
    path: Path,
    *,
    title: str,
    epochs: Sequence[Shares],
    groups: Sequence[tuple[str, Shares]],
    original: float,
    reverted: float,
    samples: Sequence[tuple[Pixels, int, int]],
) -> None:
    """Draw the demo's results as a PNG file. Accuracies are shares, 0 to 1.

    Args:
        path: where the file goes; one that is there is replaced.
        title: a line above the panels.
        epochs: by epoch of training the accuracy with the running averages that it kept, and
            that after a warm-up.
        groups: by number of groups its label, and the accuracies of the GroupNorm network with
            the affine copied, with it matched and with it calibrated.
        original: the accuracy of the BatchNorm network.
        reverted: its accuracy after conversion and revert.
        samples: images as brightness by row and column, with what was read in them before and
            after the warm-up.
    """
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no window, and none of the caller's settings change.
    figure = Figure(figsize=(15, 4.8), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13, color=INK)
    grid = figure.add_gridspec(1, 3, width_ratios=(0.95, 1.6, 0.85), wspace=0.04)
    left, middle, right = (figure.add_subfigure(grid[0, column]) for column in range(3))
    _draw_epochs(left.subplots(), epochs)
    _draw_groups(middle.subplots(), groups, original, reverted)
    _draw_samples(right, samples)
    figure.savefig(path, format="png")


def _draw_epochs(axes: Axes, epochs: Sequence[Shares]) -> None:
    series = {"running averages, as trained": PLAIN, "after normswap.warmup": OURS}
    _draw_bars(axes, epochs, series, most_level=6)
    axes.set_title("Warm-up of BatchNorm's statistics", fontsize=11, color=INK)
    ticks = range(0, len(epochs), -(-len(epochs) // MOST_TICKS))
    axes.set_xticks(ticks, [str(index + 1) for index in ticks])
    axes.set_xlabel("epochs of training", color=INK)


def _draw_groups(
    axes: Axes, groups: Sequence[tuple[str, Shares]], original: float, reverted: float
) -> None:
    axes.axhline(
        100 * original,
        color=INK,
        linewidth=1,
        linestyle=(0, (4, 3)),
        zorder=0,
        label=f"BatchNorm: {original:.1%}, after revert: {reverted:.1%}",
    )
    series = {
        'affine copied, carry="copy"': PLAIN,
        'moments matched, carry="auto"': MATCHED,
        "calibrated on data, calibrate=loader": OURS,
    }
    _draw_bars(axes, [shares for _, shares in groups], series, most_level=12)
    axes.set_title("BatchNorm to GroupNorm, no training, no labels", fontsize=11, color=INK)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.set_xlabel("number of groups", color=INK)


def _draw_bars(
    axes: Axes, rows: Sequence[Shares], series: Mapping[str, str], *, most_level: int
) -> None:
    """Draw each row's accuracies as bars side by side, with their values where there is room.

    Args:
        axes: where.
        rows: one accuracy a series each.
        series: the names of the series with their colours.
        most_level: with more bars than that, the values are written upwards.
    """
    width = BARS / len(series)
    bars = len(rows) * len(series)
    for side, (name, color) in enumerate(series.items()):
        places = [index + (side + 0.5) * width - BARS / 2 for index in range(len(rows))]
        heights = [100 * row[side] for row in rows]
        axes.bar(places, heights, width=width - GAP, color=color, label=name)
        if bars > MOST_LABELLED:
            continue
        for place, height in zip(places, heights, strict=True):
            # Inside tall bars, where the line of reference does not run through the value.
            inside = height > TALL
            axes.annotate(
                f"{height:.1f}%",
                (place, height),
                xytext=(0, -4 if inside else 3),
                textcoords="offset points",
                horizontalalignment="center",
                verticalalignment="top" if inside else "bottom",
                rotation=0 if bars <= most_level else 90,
                fontsize=8,
                color=ON[color] if inside else INK,
            )
    # Room for the legend above the bars.
    axes.set_ylim(0, 128)
    axes.set_yticks(range(0, 101, 20), [f"{value}%" for value in range(0, 101, 20)])
    axes.set_ylabel("test accuracy", color=INK)
    axes.legend(loc="upper left", fontsize=9, frameon=False, borderaxespad=0.2, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_bounds(0, 100)
    axes.tick_params(colors=INK, labelsize=9)
    axes.tick_params(axis="x", length=0)


def _draw_samples(figure: SubFigure, samples: Sequence[tuple[Pixels, int, int]]) -> None:
    """Draw test images in a grid, each with what was read before and after the warm-up."""
    figure.suptitle("Test digits, read before and after warm-up", fontsize=11, color=INK)
    rows = -(-len(samples) // SAMPLE_COLUMNS)
    grid = figure.subplots(rows, SAMPLE_COLUMNS, squeeze=False)
    for axes in grid.flat[len(samples) :]:
        axes.set_axis_off()
    for axes, (pixels, before, after) in zip(grid.flat, samples, strict=False):
        axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(FRAME)
        for x, align, text, color in (
            (0.42, "right", str(before), PLAIN),
            (0.5, "center", "→", FAINT),
            (0.58, "left", str(after), OURS),
        ):
            axes.text(
                x,
                -0.04,
                text,
                transform=axes.transAxes,
                horizontalalignment=align,
                verticalalignment="top",
                fontsize=12,
                fontweight="bold",
                color=color,
            )
