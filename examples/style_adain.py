"""A photograph with the statistics of another one: colours and textures are exchanged.

The network takes a photograph apart into cosine waves, block by block and colour by colour, has a
norm, and puts it together again; its convolutions are fixed and orthonormal, so nothing has to be
learned. Converted to ``"adain"`` (Huang and Belongie 2017, arXiv 1703.06868), the norm takes mean
and deviation of each wave from a style: `normswap.style_features` runs the style through the same
network and collects them.

In its own style a photograph comes out as it was. In another one's it has that one's colours, and
as much of each wave, where it has waves itself.

Run it with ``python examples/style_adain.py``; the picture is ``style_adain.png``.
"""

from __future__ import annotations

import math

import torch
from photographs import begin, draw, photographs
from torch import Tensor, nn

import normswap
from normswap.table import render

BLOCK = 4
WAVES = 3 * BLOCK * BLOCK
PAIRS = (("china", "china"), ("china", "flower"), ("flower", "china"))


def cosines() -> Tensor:
    """Orthonormal waves in a block of each colour, as a convolution's weight."""
    at = torch.arange(BLOCK)
    line = (math.pi / BLOCK * (at + 0.5) * at[:, None]).cos() * (2 / BLOCK) ** 0.5
    line[0] /= 2**0.5
    block = torch.einsum("ux,vy->uvxy", line, line).reshape(-1, 1, BLOCK, BLOCK)
    return torch.einsum("kixy,cd->kcdxy", block, torch.eye(3)).reshape(WAVES, 3, BLOCK, BLOCK)


def network() -> nn.Module:
    """Waves, a norm of each, and the photograph again."""
    apart = nn.Conv2d(3, WAVES, BLOCK, stride=BLOCK, bias=False)
    together = nn.ConvTranspose2d(WAVES, 3, BLOCK, stride=BLOCK, bias=False)
    for layer in (apart, together):
        layer.weight.data.copy_(cosines())
    norm = nn.BatchNorm2d(WAVES, eps=1e-8)
    return normswap.convert(nn.Sequential(apart, norm, together), to="adain")


@torch.no_grad()
def stylized(net: nn.Module, content: Tensor, style: Tensor) -> Tensor:
    """A photograph in the style of another one."""
    made: Tensor = net(content[None], style=normswap.style_features(net, style[None]))
    return made[0]


def palette(image: Tensor) -> Tensor:
    """Mean and deviation of each colour."""
    return torch.cat([image.mean((1, 2)), image.std((1, 2))])


def likeness(one: Tensor, other: Tensor) -> float:
    """How well the shapes agree: the correlation of brightness."""
    both = torch.stack([one.mean(0).flatten(), other.mean(0).flatten()])
    return float(torch.corrcoef(both)[0, 1])


def whole_blocks(image: Tensor) -> Tensor:
    """The image without what is over at its edges."""
    height, width = (size // BLOCK * BLOCK for size in image.shape[1:])
    return image[:, :height, :width]


def main() -> None:
    _, out = begin(__doc__, "style_adain.png")
    images = {name: whole_blocks(image) for name, image in photographs().items()}
    net, rows, pictures = network(), [], dict(images)
    for content, style in PAIRS:
        made = stylized(net, images[content], images[style])
        title = f"{content} as {style}"
        pictures[title] = made
        before, now = (
            float((palette(image) - palette(images[style])).norm())
            for image in (images[content], made)
        )
        shapes = likeness(made, images[content])
        rows.append((title, f"{shapes:.2f}", f"{before:.3f}", f"{now:.3f}"))
    columns = ("picture", "shapes", "colours before", "colours now")
    title = "Correlation with the content; distance of colours from the style's"
    print(render(title, columns, rows))
    draw(pictures, out)
    print(f"See {out}")


if __name__ == "__main__":
    main()
