"""The picture of norms as text: small blocks of samples, channels and positions, side by side."""

from __future__ import annotations

from torch import Tensor

from normswap.norms.spec import NormSpec
from normswap.views.dependence import SUITED, measured, suited

__all__ = ["draw_text"]

SAMPLES, CHANNELS, POSITIONS = 3, 6, 4
VALUE, POOLED, REST = "×", "█", "░"
#: Characters between two norms, and norms side by side.
GAP, COLUMNS = 4, 4


def draw_text(*norms: str | NormSpec, training: bool = True) -> str:
    """Draw what norms pool over as text, measured from the layers themselves.

    As in Wu and He, "Group Normalization", 2018, arXiv 1803.08494, figure 2, with the samples
    side by side. One value's output is looked at, while every input is changed in turn: those that
    change it are what its statistics are taken of. Norms are drawn as they start: what they learn
    may make it more.

    Args:
        *norms: registry names, aliases, or specs of `normswap.spec`. A name stands for the norm
            with two groups, groups of two samples or windows of two positions, where it has such
            options. None: all norms that are layers of their own.
        training: draw them as they are in training; else as in eval mode.

    Raises:
        UnknownNorm: no norm has the name.
        OptionError: an option does not fit the drawing's 6 channels.
    """
    wanted = [norm if isinstance(norm, NormSpec) else suited([norm])[0] for norm in norms]
    drawn = [_drawn(norm, training=training) for norm in wanted or suited()]
    lines = _legend()
    for first in range(0, len(drawn), COLUMNS):
        rows = zip(*drawn[first : first + COLUMNS], strict=True)
        lines += ["", *((" " * GAP).join(row).rstrip() for row in rows)]
    return "\n".join(lines)


def _legend() -> list[str]:
    options = ", ".join(f"{name}={value}" for name, value in SUITED.items())
    return [
        f"{SAMPLES} samples side by side, {CHANNELS} channels across, {POSITIONS} positions down.",
        f"{VALUE} is one value, {POOLED} all else that its output depends on, {REST} the rest.",
        f"Where there are such options: {options}; others are at their defaults.",
    ]


def _drawn(norm: NormSpec, *, training: bool) -> list[str]:
    """One norm's lines, all of one length: its name and its block."""
    depends = measured(norm, (SAMPLES, CHANNELS, POSITIONS, 1), training=training)
    rows = [
        " ".join(_row(depends[sample, :, position]) for sample in range(SAMPLES))
        for position in range(POSITIONS)
    ]
    rows[0] = VALUE + rows[0][1:]
    return [norm.name.ljust(len(rows[0])), *rows]


def _row(depends: Tensor) -> str:
    return "".join(POOLED if each else REST for each in depends)
