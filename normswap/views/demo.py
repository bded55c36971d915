"""The demo's picture: what a warm-up, a matched start and a revert are worth, in three panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normswap.picture import FAINT, FRAME, INK, OURS, PLAIN, Panel, draw_panel, save, sheet

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["draw_demo"]

SAMPLE_COLUMNS = 4

Pixels = Sequence[Sequence[float]]
Pair = tuple[float, float]
Triple = tuple[float, float, float]


def draw_demo(
    path: Path,
    *,
    title: str,
    epochs: Sequence[Pair],
    groups: Sequence[tuple[str, Triple]],
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
            the affine copied and with it matched.
        original: the accuracy of the BatchNorm network.
        reverted: its accuracy after conversion and revert.
        samples: images as brightness by row and column, with what was read in them before and
            after the warm-up.
    """
    figure, (left, middle, right) = sheet(title, widths=(4.4, 6.4, 4.0), height=4.8)
    draw_panel(left.subplots(), _epochs(epochs))
    draw_panel(middle.subplots(), _groups(groups, original, reverted))
    _draw_samples(right, samples)
    save(figure, path)


def _epochs(epochs: Sequence[Pair]) -> Panel:
    return Panel(
        "Warm-up of BatchNorm's statistics",
        "epochs of training",
        "test accuracy",
        {
            "running averages, as trained": [100 * running for running, _ in epochs],
            "after normswap.warmup": [100 * warmed for _, warmed in epochs],
        },
        names=[str(number) for number, _ in enumerate(epochs, start=1)],
        percent=True,
    )


def _groups(groups: Sequence[tuple[str, Triple]], original: float, reverted: float) -> Panel:
    return Panel(
        "BatchNorm to GroupNorm, no training, no labels",
        "number of groups",
        "test accuracy",
        {
            'affine copied, carry="copy"': [100 * copied for _, (copied, _, _) in groups],
            'moments matched, carry="auto"': [100 * matched for _, (_, matched, _) in groups],
            "calibrated, calibrate=loader": [100 * fitted for _, (_, _, fitted) in groups],
        },
        names=[label for label, _ in groups],
        rules={f"BatchNorm: {original:.1%}, after revert: {reverted:.1%}": 100 * original},
        percent=True,
    )


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
