"""What the examples on photographs share: scikit-learn's two, crops of them, and pictures.

It is no example itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from normswap.picture import save, sheet

NAMES = ("china", "flower")


def photographs(shrink: int = 2) -> dict[str, Tensor]:
    """The photographs (3, H, W) in [0, 1], each side divided by ``shrink``."""
    from sklearn.datasets import load_sample_image

    found = {}
    for name in NAMES:
        pixels = torch.as_tensor(load_sample_image(f"{name}.jpg").copy()).movedim(-1, 0)
        found[name] = avg_pool2d(pixels.float() / 255, shrink)
    return found


def crops(image: Tensor, count: int, side: int, order: torch.Generator) -> Tensor:
    """Squares from anywhere in an image (C, H, W), as (count, C, side, side)."""
    _, height, width = image.shape
    tops = torch.randint(height - side + 1, (count,), generator=order)
    lefts = torch.randint(width - side + 1, (count,), generator=order)
    return torch.stack(
        [image[:, t : t + side, l : l + side] for t, l in zip(tops, lefts, strict=True)]  # noqa: E741
    )


def draw(pictures: Mapping[str, Tensor], path: Path) -> None:
    """Images (3, H, W) side by side, each with its title."""
    figure, parts = sheet("", widths=[3.0] * len(pictures), height=2.6)
    for part, (title, image) in zip(parts, pictures.items(), strict=True):
        axes = part.subplots()
        axes.imshow(image.detach().clamp(0, 1).movedim(0, -1).numpy())
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    save(figure, path)


def begin(description: str | None, out: str) -> tuple[int, Path]:
    """Keep torch to one thread, and read the command line.

    Args:
        description: for ``--help``.
        out: where the picture goes if nothing is said.

    Returns:
        By how much there is to be less training, and where the picture goes.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train a quarter as long")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"the picture: {out}")
    given = parser.parse_args()
    return 4 if given.quick else 1, given.out
