"""Formulas of norms that change the layer before them, written patch by patch.

Plain float64 arithmetic on the layer's weight, with every patch of the padded map cut out by
itself: ``(N, groups, patch, positions)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.beyond import along


@dataclass(frozen=True)
class Geometry:
    """How a convolution lays its filters on a map of two dimensions."""

    kernel: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Every patch with zeros outside of the map, and the shape of the positions."""
        rows, columns = self.padding
        padded = torch.nn.functional.pad(x, (columns, columns, rows, rows))
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        sizes = [
            (length - span) // step + 1
            for length, span, step in zip(padded.shape[2:], reach, self.stride, strict=True)
        ]
        cut = []
        for place in itertools.product(*map(range, sizes)):
            top, left = (p * s for p, s in zip(place, self.stride, strict=True))
            part = padded[
                :,
                :,
                top : top + reach[0] : self.dilation[0],
                left : left + reach[1] : self.dilation[1],
            ]
            cut.append(part.reshape(len(x), self.groups, -1))
        return torch.stack(cut, -1), (sizes[0], sizes[1])


def outputs(
    x: Tensor, weight: Tensor, geometry: Geometry, rule: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A layer whose output is a rule on filters (O, D) and the patches (N, D, L) of their group."""
    patches, sizes = geometry.patches(x)
    filters = weight.reshape(geometry.groups, -1, patches.shape[2])
    parts = [rule(filters[g], patches[:, g]) for g in range(geometry.groups)]
    return torch.cat(parts, 1).reshape(len(x), len(weight), *sizes)


def cosine(filters: Tensor, patches: Tensor) -> Tensor:
    """Luo et al. 2018: the product over both lengths, each with 1e-5 under its root."""
    product = torch.einsum("od,ndl->nol", filters, patches)
    lengths = ((patches**2).sum(1, keepdim=True) + 1e-5) ** 0.5
    return product / lengths / ((filters**2).sum(1)[:, None] + 1e-5) ** 0.5


def pearson(filters: Tensor, patches: Tensor) -> Tensor:
    """The same of filters and patches less their means."""
    size = filters.shape[1]
    filters = filters - filters.sum(1, keepdim=True) / size
    return cosine(filters, patches - patches.sum(1, keepdim=True) / size)


def standardized(filters: Tensor, patches: Tensor) -> Tensor:
    """Qiao et al. 2019: filters less their means, by their unbiased deviations and 1e-5."""
    size = filters.shape[1]
    away = filters - filters.sum(1, keepdim=True) / size
    deviation = ((away**2).sum(1, keepdim=True) / (size - 1)) ** 0.5
    return torch.einsum("od,ndl->nol", away / (deviation + 1e-5), patches)


def group_norm(x: Tensor, groups: int) -> Tensor:
    """Wu and He 2018, biased, without gain and offset."""
    rows = x.reshape(len(x), groups, -1)
    mean = rows.sum(2, keepdim=True) / rows.shape[2]
    var = ((rows - mean) ** 2).sum(2, keepdim=True) / rows.shape[2]
    return ((rows - mean) / (var + 1e-5) ** 0.5).reshape(x.shape)


@dataclass
class CrossIteration:
    """Yao et al. 2021: mean squares as the paper has them, derivatives by autograd.

    ``rule`` is what becomes of a predicted mean square below the square of its mean.
    """

    geometry: Geometry
    previous: int
    rule: str = "max"
    outside: bool = False
    past: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __call__(
        self, x: Tensor, weight: Tensor, layer_bias: Tensor, gain: Tensor, offset: Tensor
    ) -> Tensor:
        def run(filters: Tensor, patches: Tensor) -> Tensor:
            return torch.einsum("od,ndl->nol", filters, patches)

        y = outputs(x, weight, self.geometry, run) + along(layer_bias, x)
        mean, square = (t.mean((0, 2, 3)) for t in (y, y**2))
        again = weight.detach().clone().requires_grad_()
        z = outputs(x.detach(), again, self.geometry, run) + along(layer_bias.detach(), x)
        slopes = [torch.autograd.grad(t.mean((0, 2, 3)).sum(), again, retain_graph=True)[0]
                  for t in (z, z**2)]  # fmt: skip
        means, squares = [mean], [square]
        valid = [torch.ones_like(mean)]
        for old_mean, old_square, dmean, dsquare, old_weight, old_bias in self.past:
            change, shift = weight.detach() - old_weight, layer_bias.detach() - old_bias
            predicted = old_mean + (dmean * change).flatten(1).sum(1)
            predicted_square = old_square + (dsquare * change).flatten(1).sum(1)
            # A bias moves all values alike: the mean, and of the mean square what follows of it.
            predicted_square = predicted_square + 2 * shift * predicted + shift**2
            predicted = predicted + shift
            below = predicted_square < predicted**2
            valid.append((~below).to(mean) if self.rule == "drop" else torch.ones_like(mean))
            squares.append(torch.where(below, predicted**2, predicted_square))
            means.append(predicted)
        self.past.append((mean.detach(), square.detach(), *slopes,
                          weight.detach().clone(), layer_bias.detach().clone()))  # fmt: skip
        self.past = self.past[-self.previous :]
        count = sum(valid)
        centre = sum(v * m for v, m in zip(valid, means, strict=True)) / count
        spread = sum(v * s for v, s in zip(valid, squares, strict=True)) / count - centre**2
        divisor = spread**0.5 + 1e-5 if self.outside else (spread + 1e-5) ** 0.5
        return along(gain, y) * (y - along(centre, y)) / along(divisor, y) + along(offset, y)
