"""A picture from a label map: given to every norm, where BatchNorm would wash it out.

The labels are clusters of a photograph's colours. A small generator sees a label map at an eighth
of the size, doubles it three times, and is to paint the photograph. With BatchNorm that is all it
knows. Converted to ``"spade"`` (Park et al. 2019, arXiv 1903.07291), the same generator is called
with ``segmap=`` as well, and each norm sees the label map in the size of its own map.
Both learn on the left three quarters of the photograph, and are
measured on the rest.

Run it with ``python examples/spade_label_map.py``; the picture is ``spade_label_map.png``.
``--quick`` trains a quarter as long.
"""

from __future__ import annotations

from typing import Any

import torch
from photographs import begin, crops, draw, photographs
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, one_hot

import normswap
from normswap.table import render

LABELS, WIDTH, HIDDEN = 8, 24, 24
STEPS, SIDE, CROPS = 240, 64, 6
SHRINK = 8


def clusters(image: Tensor, *, steps: int = 10) -> Tensor:
    """The label (H, W) of each pixel: its colour's cluster, by k-means."""
    colours = image.flatten(1).t()
    order = torch.Generator().manual_seed(0)
    centres = colours[torch.randperm(len(colours), generator=order)[:LABELS]]
    for _ in range(steps):
        nearest = torch.cdist(colours, centres).argmin(1)
        centres = torch.stack(
            [colours[nearest == k].mean(0) if (nearest == k).any() else centres[k]
             for k in range(LABELS)]
        )  # fmt: skip
    return torch.cdist(colours, centres).argmin(1).view(image.shape[1:])


def generator() -> nn.Module:
    """Convolutions with BatchNorm on maps of 1/8, 1/4, 1/2 and all of the size."""
    layers: list[nn.Module] = [nn.Conv2d(LABELS, WIDTH, 3, padding=1)]
    for _ in range(3):
        layers += [
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        ]  # fmt: skip
    return nn.Sequential(
        *layers, nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, 3, 3, padding=1)
    )


def painted(net: nn.Module, labels: Tensor) -> Tensor:
    """What a generator makes of label maps (N, H, W)."""
    small = interpolate(labels[:, None].float(), scale_factor=1 / SHRINK)[:, 0].long()
    first = one_hot(small, LABELS).movedim(-1, 1).float()
    given: dict[str, Any] = {"segmap": labels} if normswap.inputs(net) else {}
    made: Tensor = net(first, **given)
    return made


def train(net: nn.Module, image: Tensor, labels: Tensor, steps: int) -> None:
    """Learn to paint crops of the image from the same crops of its labels."""
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    together = torch.cat([image, labels[None].float()])
    for _ in range(steps):
        batch = crops(together, CROPS, SIDE, order)
        optimizer.zero_grad()
        mse_loss(painted(net, batch[:, 3].long()), batch[:, :3]).backward()
        optimizer.step()


def main() -> None:
    less, out = begin(__doc__, "spade_label_map.png")
    image = photographs()["china"]
    height, width = (size // SHRINK * SHRINK for size in image.shape[1:])
    image = image[:, :height, :width]
    labels = clusters(image)
    seen = width * 3 // 4 // SHRINK * SHRINK
    pictures = {"photograph": image[..., seen:]}
    rows = []
    for name in ("BatchNorm", "SPADE"):
        torch.manual_seed(0)
        net = generator()
        if name == "SPADE":
            net = normswap.convert(net, to="spade", num_labels=LABELS, hidden_dim=HIDDEN)
        train(net, image[..., :seen], labels[:, :seen], STEPS // less)
        with torch.no_grad():
            made = painted(net.eval(), labels[None, :, seen:])[0]
        pictures[name] = made
        rows.append((name, f"{float(mse_loss(made, pictures['photograph'])) ** 0.5:.3f}"))
    print(render("Root mean square error of the part never seen", ("norm", "error"), rows))
    draw(pictures, out)
    print(f"See {out}")


if __name__ == "__main__":
    main()
