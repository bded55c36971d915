"""Weight standardization with group normalization.

Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", 2019, arXiv 1903.10520.

The layer that feeds the norm standardizes each of its filters before it applies them, by the mean
and the unbiased deviation of the filter's weights. That loses what a filter's mean contributed,
and nothing can give it back: gain and offset are copied, which is the paper's way as filters are
of one scale then, and `normswap.calibrate` fits them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.beside import Remade
from normswap.norms.entry import MAP_SOURCES, NormEntry
from normswap.norms.fidelity import Fidelity
from normswap.norms.remake import Mixin, why_not
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState
from normswap.norms.statistics.group import OPTIONS, GroupNorm, read_group_norm, start_group_norm

__all__ = ["ENTRIES", "StandardizedWeight", "WeightStandardizedGroupNorm", "standardized"]

#: Added to the deviation of a filter's weights, as in the paper's code.
EPS = 1e-5


def standardized(weight: Tensor) -> Tensor:
    """Each filter less its mean, by its unbiased deviation and 1e-5.

    Args:
        weight: (C, ...), with a filter for each output channel.
    """
    filters = weight.flatten(1)
    shape = (-1, *[1] * (weight.ndim - 1))
    mean, deviation = filters.mean(1).view(shape), filters.std(1).view(shape)
    return (weight - mean) / (deviation + EPS)


class StandardizedWeight(Mixin):
    """A convolution or linear that standardizes its filters first."""

    weight: Tensor
    bias: Tensor | None

    def forward(self: Any, input: Tensor) -> Tensor:
        """Apply the standardized filters, with everything else as it is."""
        weight = standardized(self.weight)
        if isinstance(self, nn.Linear):
            return F.linear(input, weight, self.bias)
        y: Tensor = self._conv_forward(input, weight, self.bias)
        return y


class WeightStandardizedGroupNorm(GroupNorm):
    """A group norm behind a layer whose weight is standardized."""


def start_weight_standardized(state: NormState, *, carry: Carry = "auto", **options: Any) -> Start:
    """Start a group norm with weight and bias copied; the layer before it gets another class."""
    problem = why_not(state.producer)
    layer: Any = state.producer.module
    if not problem and layer.weight[0].numel() == 1:
        problem = f"the filters of {state.producer.path} are single numbers"
    if problem:
        raise CannotConvert(
            f"weight standardization needs the layer that feeds it: {problem}",
            'leave it out by skip=, or use to="gn"',
        )
    start = start_group_norm(
        state,
        carry="copy" if carry == "auto" else carry,
        made_of=WeightStandardizedGroupNorm,
        **options,
    )
    remade = Remade(layer, StandardizedWeight)
    start = start.noted(f"{state.producer.path} standardizes its weight")
    # The same group norm, of another input, is not the same function.
    return replace(start, fidelity=start.fidelity.at_most(Fidelity.AFFINE), beside=(remade,))


def read_weight_standardized(module: nn.Module) -> NormState:
    """Read the group norm; what is before it stays as it is, whatever takes the norm's place."""
    return replace(read_group_norm(module), norm="ws_gn")


ENTRIES = (
    NormEntry(
        name="ws_gn",
        aliases=("weight_standardization", "ws"),
        kind="group_norm",
        axis="standardization",
        pooled="a group of channels × H·W, per sample; and the weights of each filter before it",
        paper="Qiao et al. 2019, arXiv 1903.10520",
        sources=MAP_SOURCES,
        start=start_weight_standardized,
        reads={WeightStandardizedGroupNorm: read_weight_standardized},
        options=OPTIONS,
        needs=frozenset({"neighbours"}),
    ),
)
