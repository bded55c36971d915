"""The picture of a norm: which values one of its statistics is pooled over, measured.

Drawn as in Wu and He, "Group Normalization", 2018, arXiv 1803.08494, figure 2: a batch of feature
maps as a block of little cubes, over the samples, the channels and the positions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.registry import lookup
from normswap.norms.spec import build
from normswap.picture import FAINT, INK, OURS, PLAIN, save, sheet
from normswap.randomness import kept_random_state

__all__ = ["dependence", "draw", "draw_norms"]

#: Samples, channels, and positions along a side, of the batch that is drawn.
SAMPLES, CHANNELS, SIDE = 4, 6, 3
#: By this much an input is changed, and by more than this an output has to change.
STEP, CHANGE = 0.5, 1e-9

EMPTY, EDGE = "#FFFFFF", "#B5B5B5"


def draw(name: str, path: str | os.PathLike[str], *, training: bool = True, **options: Any) -> None:
    """Draw what a norm pools over, measured from the layer itself.

    One value's output is looked at, while every input is changed in turn: those that change it
    are what its statistics are taken of. The value itself is marked.

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
    draw_norms({lookup(name).name: (name, options)}, path, training=training)


def draw_norms(
    norms: Mapping[str, tuple[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    training: bool = True,
    columns: int = 5,
) -> None:
    """Draw several norms on one sheet.

    Args:
        norms: by title their names and options.
        path: where the picture goes.
        training: draw them as they are in training; else as in eval mode.
        columns: how many stand side by side.
    """
    columns = min(columns, len(norms))
    rows = -(-len(norms) // columns)
    figure, parts = sheet("", widths=[2.6] * columns, height=2.75 * rows)
    solid = {"projection": "3d"}
    grids = [part.subplots(rows, 1, squeeze=False, subplot_kw=solid) for part in parts]
    for place, (title, (name, options)) in enumerate(norms.items()):
        with kept_random_state():
            norm = build(name, CHANNELS, **options).train(training)
        _draw_block(grids[place % columns][place // columns, 0], title, dependence(norm))
    for place in range(len(norms), rows * columns):
        grids[place % columns][place // columns, 0].set_axis_off()
    save(figure, path)


@torch.no_grad()
def dependence(norm: nn.Module) -> Tensor:
    """Which inputs one output depends on, found by changing them one by one.

    Args:
        norm: for `CHANNELS` channels.

    Returns:
        Booleans (N, C, H·W) for the output at the first sample, channel and position.
    """
    norm = norm.double()
    shape = (SAMPLES, CHANNELS, SIDE, SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = torch.empty(x.numel(), dtype=torch.bool)
    with kept_random_state():
        output = _first_output(norm, x)
        for index in range(x.numel()):
            other = x.clone()
            other.view(-1)[index] += STEP
            changed[index] = bool((_first_output(norm, other) - output).abs() > CHANGE)
    return changed.view(SAMPLES, CHANNELS, SIDE * SIDE)


def _first_output(norm: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # a norm that draws random numbers draws the same ones
    output: Tensor = norm(x)[0, 0, 0, 0]
    return output


def _draw_block(axes: Any, title: str, depends: Tensor) -> None:
    import numpy as np  # which matplotlib brings

    # By channel, sample and position from below: the measured value is at the front, on top.
    block = depends.permute(1, 0, 2).flip(2).numpy()
    colors = np.where(block, OURS, EMPTY)
    colors[0, 0, -1] = PLAIN
    axes.voxels(np.ones_like(block), facecolors=colors, edgecolor=EDGE, linewidth=0.5, shade=False)
    axes.text2D(0.5, 1.0, title, transform=axes.transAxes, color=INK, fontsize=11, ha="center")
    axes.set_box_aspect(block.shape)
    axes.view_init(elev=24, azim=-56)
    axes.set_axis_off()
    for label, place in (
        ("C", (CHANNELS / 2, 0, -0.9)),
        ("N", (CHANNELS, SAMPLES / 2, -0.9)),
        ("H, W", (-1.3, 0, SIDE * SIDE / 2)),
    ):
        axes.text(*place, label, color=FAINT, fontsize=8, ha="center", va="center")
