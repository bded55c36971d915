"""The picture of norms: which values one of their statistics is pooled over, measured.

Drawn as in Wu and He, "Group Normalization", 2018, arXiv 1803.08494, figure 2: a batch of feature
maps as a block of little cubes, over the samples, the channels and the positions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normswap.norms.spec import NormSpec, spec
from normswap.picture import FAINT, INK, OURS, PLAIN, save, sheet
from normswap.views.dependence import measured

__all__ = ["draw", "draw_norms"]

#: Samples, channels, and positions along a side, of the batch that is drawn.
SAMPLES, CHANNELS, SIDE = 4, 6, 3
#: Norms side by side.
COLUMNS = 5

EMPTY, EDGE = "#FFFFFF", "#B5B5B5"


def draw(name: str, path: str | os.PathLike[str], *, training: bool = True, **options: Any) -> None:
    """Draw what a norm pools over, measured from the layer itself.

    One value's output is looked at, while every input is changed in turn: those that change it
    are what its statistics are taken of. The value itself is marked. ``normswap draw`` on the
    command line draws all norms.

    Args:
        name: registry name or alias.
        path: where the picture goes; its ending says the format, such as ``.png`` or ``.svg``.
        training: draw it as it is in training; else as in eval mode.
        options: the norm's options, as for `normswap.build`. The picture has 6 channels.

    Raises:
        UnknownNorm: no norm has the name.
        MissingExtra: matplotlib is not installed.
        OptionError: an option does not fit, or the picture cannot be written there.
    """
    draw_norms([spec(name, **options)], path, training=training)


def draw_norms(
    norms: Sequence[NormSpec], path: str | os.PathLike[str], *, training: bool = True
) -> None:
    """Draw norms on one sheet, each with its options beside its name.

    Args:
        norms: which, one at least.
        path: where the picture goes.
        training: draw them as they are in training; else as in eval mode.

    Raises:
        MissingExtra: matplotlib is not installed.
        OptionError: the picture cannot be written there.
    """
    columns = min(COLUMNS, len(norms))
    rows = -(-len(norms) // columns)
    figure, parts = sheet("", widths=[2.6] * columns, height=2.75 * rows)
    solid = {"projection": "3d"}
    grids = [part.subplots(rows, 1, squeeze=False, subplot_kw=solid) for part in parts]
    for place, norm in enumerate(norms):
        depends = measured(norm, (SAMPLES, CHANNELS, SIDE, SIDE), training=training)
        _draw_block(grids[place % columns][place // columns, 0], norm, depends)
    for place in range(len(norms), rows * columns):
        grids[place % columns][place // columns, 0].set_axis_off()
    save(figure, path)


def _draw_block(axes: Any, norm: NormSpec, depends: Tensor) -> None:
    import numpy as np  # which matplotlib brings

    # By channel, sample and position from below: the measured value is at the front, on top.
    block = depends.permute(1, 0, 2).flip(2).numpy()
    colors = np.where(block, OURS, EMPTY)
    colors[0, 0, -1] = PLAIN
    axes.voxels(np.ones_like(block), facecolors=colors, edgecolor=EDGE, linewidth=0.5, shade=False)
    axes.text2D(0.5, 1.0, str(norm), transform=axes.transAxes, color=INK, fontsize=11, ha="center")
    axes.set_box_aspect(block.shape)
    axes.view_init(elev=24, azim=-56)
    axes.set_axis_off()
    for label, place in (
        ("C", (CHANNELS / 2, 0, -0.9)),
        ("N", (CHANNELS, SAMPLES / 2, -0.9)),
        ("H, W", (-1.3, 0, SIDE * SIDE / 2)),
    ):
        axes.text(*place, label, color=FAINT, fontsize=8, ha="center", va="center")
