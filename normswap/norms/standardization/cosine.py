"""Cosine normalization: a layer's output is the angle between its filters and what it is given.

Luo, Zhan, Wang and Yang, "Cosine Normalization: Using Cosine Similarity Instead of Dot
Product in Neural Networks", ICANN 2018, arXiv 1702.05870, with its centred form, the Pearson
correlation.

The convolution or linear before the norm divides its output by the length of each filter and by
that of the patch under it, whose values outside of the map are zeros. The norm becomes a gain and
an offset per channel, beyond the paper, in which activations follow at once: without them nothing
could be carried over, and outputs stay between -1 and 1. The layer's bias is put aside, as the
offset takes it in. Lengths have 1e-5 added under their roots, which the paper leaves open.

From running statistics the start is exact where all patches have the expected length, which is
foreseen from the norm before, or estimated from the running statistics as if patches had no
preferred direction. `normswap.calibrate` does better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.affine_norm import AffineNorm
from normswap.norms.beside import Look, Remade, Rewritten
from normswap.norms.declared import declared
from normswap.norms.pool import Curve, Rule
from normswap.norms.precision import precise
from normswap.norms.remake import Mixin, why_not
from normswap.norms.start import Start
from normswap.norms.state import NormState
from normswap.norms.statistics.foreseen import foreseen_inputs, functions_between, why_unforeseen

__all__ = ["ENTRIES", "CosineNorm", "CosineSimilarity", "PearsonNorm", "PearsonSimilarity"]

EPS = 1e-5


class CosineSimilarity(Mixin):
    """A convolution or linear whose output is divided by both lengths."""

    centred: ClassVar[bool] = False
    weight: Tensor

    def forward(self: Any, input: Tensor) -> Tensor:
        """The cosine of the angle between each filter and each patch, -1 to 1."""
        filters = self.weight.flatten(1)
        if self.centred:
            filters = filters - filters.mean(1, keepdim=True)
        y = _applied(self, input, filters.view_as(self.weight))
        with torch.autocast(input.device.type, enabled=False):
            work = torch.promote_types(input.dtype, torch.float32)
            squares = _patch_squares(self, input.to(work), centred=self.centred)
            scale = (filters.to(work).square().sum(1) + EPS).rsqrt()
            scaled: Tensor = y * (squares + EPS).rsqrt() * scale.view(-1, *[1] * _spatial(self))
            return scaled.to(y.dtype)


class PearsonSimilarity(CosineSimilarity):
    """The same with the mean of each filter and of each patch subtracted first."""

    centred = True


class CosineNorm(AffineNorm):
    """weight · x + bias, behind a layer that yields cosines.

    Args:
        num_features: C.
        **rest: as for `AffineNorm`; eps is only kept for a conversion to a norm that has one.
    """

    eps_option = None
    similarity: ClassVar[type[CosineSimilarity]] = CosineSimilarity

    def standardize(self, x: Tensor) -> Tensor:
        """Leave the input, which the layer before has normalized."""
        return x

    def pools(self, *, tracks: bool) -> Rule:
        """Nothing here; what the layer before makes of its input is no straight curve."""
        return Rule.always(Curve(curve=self.similarity.__name__))

    def started(self, state: NormState, start: Start) -> Start:
        """Give the layer before another class, and take in what it scaled its outputs by.

        Raises:
            CannotConvert: no convolution or linear feeds the norm alone.
        """
        layer: Any = state.producer.module
        problem = why_not(state.producer)
        if problem:
            raise CannotConvert(
                f"it is a property of the layer that feeds the norm: {problem}",
                "leave it out by skip=",
            )
        foreseen = not why_unforeseen(state.previous, layer)
        start = start.noted(f"{state.producer.path} yields cosines")
        if start.rewrites_affine and not start.fresh:
            start = replace(start, values=partial(self._scaled, state, foreseen))
        bias = () if layer.bias is None else (Rewritten(layer, _no_bias),)
        return replace(start, beside=(*start.beside, Remade(layer, self.similarity), *bias))

    def _scaled(self, state: NormState, foreseen: bool) -> dict[str, Tensor]:
        """Gain and offset by which cosines become the source's output, for patches as expected."""
        if state.running_mean is None or state.running_var is None:
            raise ValueError("the source keeps no running statistics")
        layer: Any = state.producer.module
        mean, var = precise(state.running_mean), precise(state.running_var)
        gain, offset = state.gain_and_offset()
        bias = torch.zeros_like(mean) if layer.bias is None else precise(layer.bias)
        center, divided = state.rule.eval.expected(mean, var)
        slope = gain / state.rule.eval.divisor(divided, state.eps)
        filters = precise(layer.weight).flatten(1)
        sums = filters.sum(1)
        if self.similarity.centred:
            filters = filters - filters.mean(1, keepdim=True)
        squares = filters.square().sum(1)
        patches = _Patches(state, filters.shape[1], self.similarity.centred)
        if foreseen:
            level, length = patches.foreseen(mean)
        else:
            level, length = patches.estimated(mean - bias, var, sums, squares)
        if self.similarity.centred:
            bias = bias + sums * level
        lengths = ((squares + EPS) * (length.clamp(min=0) + EPS)).sqrt()
        dtype = state.reference().dtype
        return {
            "weight": (slope * lengths).to(dtype),
            "bias": (offset + slope * (bias - center)).to(dtype),
        }


@dataclass(frozen=True)
class _Patches:
    """What is expected of the patches under a layer's filters: mean value and square length.

    Args:
        state: the norm behind the layer.
        size: how many values a patch has.
        centred: whether the length is that of deviations from the mean value.
    """

    state: NormState
    size: int
    centred: bool

    def foreseen(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """By the norm before the layer, two tensors (C,)."""
        previous = self.state.previous
        inputs = foreseen_inputs(previous.norm, functions_between(previous), like)
        mean, var = (each.detach().view(self._groups, -1) for each in inputs)
        level, square = mean.mean(1), (var + mean.square()).mean(1)
        if self.centred:
            square = square - level.square()
        return self._spread(level), self._spread(square * self.size)

    def estimated(
        self, mean: Tensor, var: Tensor, sums: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By what the filters made of them, as if patches had no direction beside their mean.

        Args:
            mean: of the layer's output without its bias, (C,).
            var: of it, likewise.
            sums: of each filter's weights.
            squares: each filter's square length.
        """
        by_group = (self._groups, -1)
        least = torch.finfo(mean.dtype).tiny
        product = (sums * mean).view(by_group).sum(1)
        level = self._spread(product / sums.square().view(by_group).sum(1).clamp(min=least))
        rest = mean - sums * level if self.centred else mean
        shares = (var + rest.square()) / squares.clamp(min=EPS)
        return level, self._spread(shares.view(by_group).mean(1) * self.size)

    @property
    def _groups(self) -> int:
        return getattr(self.state.producer.module, "groups", 1)

    def _spread(self, by_group: Tensor) -> Tensor:
        return by_group.repeat_interleave(self.state.num_features // self._groups)


class PearsonNorm(CosineNorm):
    """weight · x + bias, behind a layer that yields correlations."""

    similarity = PearsonSimilarity


def _applied(layer: Any, input: Tensor, weight: Tensor) -> Tensor:
    """What a layer makes of an input by another weight, without its bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(input, weight)
    y: Tensor = layer._conv_forward(input, weight, None)
    return y


def _patch_squares(layer: Any, input: Tensor, *, centred: bool) -> Tensor:
    """The square length of every patch, or its sum of squared deviations, for every filter."""
    if isinstance(layer, nn.Linear):
        if centred:
            input = input - input.mean(-1, keepdim=True)
        return input.square().sum(-1, keepdim=True)
    ones = torch.ones_like(layer.weight[: layer.groups], dtype=input.dtype)
    squares = _applied(layer, input.square(), ones)
    if centred:
        squares = squares - _applied(layer, input, ones).square() / ones[0].numel()
    filters = layer.out_channels // layer.groups
    return squares.clamp(min=0).repeat_interleave(filters, -1 - _spatial(layer))


def _spatial(layer: Any) -> int:
    """How many dimensions follow the channels of a layer's output."""
    return 0 if isinstance(layer, nn.Linear) else layer.weight.ndim - 2


def _no_bias(look: Look) -> dict[str, Tensor | None]:
    return {"bias": None}


ENTRIES = tuple(
    declared(
        cls,
        name=name,
        aliases=aliases,
        kind="cosine_norm",
        axis="standardization",
        pooled=f"the patch under each filter, by its length{more}",
        paper="Luo et al. 2018, arXiv 1702.05870",
        needs=("neighbours", "previous"),
    )
    for cls, name, aliases, more in (
        (CosineNorm, "cosine", ("cosine_norm", "cosine_normalization"), ""),
        (PearsonNorm, "pearson", ("pearson_norm", "centered_cosine"), " less its mean"),
    )
)
