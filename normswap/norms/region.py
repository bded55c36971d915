"""Learned region normalization: what a network deems a hole is normalized apart from the rest.

Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, "Region Normalization for Image Inpainting", AAAI 2020,
arXiv 1911.10375, the variant RN-L.

A convolution of each position's mean and maximum over the channels tells how much the position
belongs to the holes; from a threshold on it does, which no gradient goes through. Each of the two
regions is standardized by its own statistics, per channel, over the batch, or over each sample
with ``per_sample``. Gain and offset of positions are two further convolutions of the same map.
In the authors' code eps is as many times larger as the region is smaller than the whole, so that
small regions are damped; ``eps_scaled=False`` adds eps as it is. A region of no values has no
output to give. Nothing is kept: in eval mode samples still depend on their batch.

The paper's gain and offset are the same for all channels. Here weight and bias per channel come
on top, so that an affine is not lost, and all three convolutions start at zero, where the paper
draws them: everything is one region then, and the norm a batch norm in training. Gain and offset
learn first, and from the next step on the regions through them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.affine import AffineNorm, described
from normswap.norms.base import place
from normswap.norms.batch import BATCH_SOURCES
from normswap.norms.entry import AFFINE, EPS, NormEntry, flag, number
from normswap.norms.pool import Pool, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "LearnedRegionNorm"]

THRESHOLD = 0.8
KERNEL = 7


@dataclass(frozen=True)
class _Regions(Pool):
    """Two regions of the batch, or of each sample, per channel.

    Args:
        threshold: what tells them apart, with what the norm has learned.
        eps_scaled: whether small regions have a larger eps.
    """

    threshold: float = THRESHOLD
    eps_scaled: bool = True


class LearnedRegionNorm(AffineNorm):
    """weight · (z · (1 + gain) + offset) + bias, where z is standardized region by region.

    Args:
        num_features: C.
        dim: how many dimensions follow the channels, 1 to 3. An input (N, C) has one position.
        threshold: from where on a position belongs to the holes. Default 0.8.
        per_sample: whether regions are those of each sample. Default no.
        eps_scaled: whether eps is divided by the region's share of the values. Default yes.
        eps: added to the variance. Default 1e-5.

    Attributes:
        region_weight: (1, 2, 7, ...), which tells the regions apart.
        gain_weight: (1, 1, 7, ...), as is offset_weight; gain_bias and offset_bias: (1,).

    Raises:
        DegeneratePooling: at a forward with a single value for each channel.
    """

    own = ("region_weight", "gain_weight", "gain_bias", "offset_weight", "offset_bias")

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        threshold: float = THRESHOLD,
        per_sample: bool = False,
        eps_scaled: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_features, eps, dim)
        self.threshold = threshold
        self.per_sample = per_sample
        self.eps_scaled = eps_scaled
        self.kernel_dims = dim
        kernel = [KERNEL] * dim
        self.region_weight = nn.Parameter(torch.zeros(1, 2, *kernel))
        self.gain_weight = nn.Parameter(torch.zeros(1, 1, *kernel))
        self.gain_bias = nn.Parameter(torch.zeros(1))
        self.offset_weight = nn.Parameter(torch.zeros(1, 1, *kernel))
        self.offset_bias = nn.Parameter(torch.zeros(1))

    def standardize(self, x: Tensor) -> Tensor:
        """Standardize both regions and apply gain and offset of every position."""
        if x.ndim == 2:
            return self.standardize(x.view(*x.shape, *[1] * self.kernel_dims)).view_as(x)
        with torch.autocast(x.device.type, enabled=False):
            seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            likely = self._convolved(seen, self.region_weight, None).sigmoid()
            gain = self._convolved(likely, self.gain_weight, self.gain_bias)
            offset = self._convolved(likely, self.offset_weight, self.offset_bias)
        inside = (likely.detach() >= self.threshold).to(x.dtype)
        z = self._apart(x, inside) + self._apart(x, 1 - inside)
        return z * (1 + gain) + offset

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.kernel_dims - 1]
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = convolve(x, weight.to(x.dtype), bias, padding=KERNEL // 2)
        return y

    def _apart(self, x: Tensor, region: Tensor) -> Tensor:
        """The values of a region (N, 1, ...) standardized, and zero elsewhere."""
        dims = [*([] if self.per_sample else [0]), *range(2, x.ndim)]
        values = math.prod([x.shape[dim] for dim in dims])
        remedy = "a larger map" if self.per_sample else "a larger batch"
        self.refuse_single_value(values, f"use {remedy}")
        inside = region.sum(dims, keepdim=True)
        count = inside.clamp(min=1)
        centred = (x - (x * region).sum(dims, keepdim=True) / count) * region
        var = centred.square().sum(dims, keepdim=True) / count
        eps = self.eps * values / count if self.eps_scaled else self.eps
        return centred * (var + eps).rsqrt()

    def extra_repr(self) -> str:
        """Say how regions are told apart, too."""
        return f"{super().extra_repr()}, threshold={self.threshold}, per_sample={self.per_sample}"


def _rule(*, threshold: float, per_sample: bool, eps_scaled: bool) -> Rule:
    over: Any = "group" if per_sample else "batch"
    return Rule.always(_Regions(over, threshold=threshold, eps_scaled=eps_scaled))


def start_learned_region_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    threshold: float | None = None,
    per_sample: bool = False,
    eps_scaled: bool = True,
    eps: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a LearnedRegionNorm, at first with one region, and gain and offset per channel."""
    if state.channel_dim == 1 and state.dim not in (0, 1, 2, 3):
        raise CannotConvert(
            "nothing tells how many dimensions its input has", "give example_inputs"
        )
    limit = THRESHOLD if threshold is None else threshold
    told = state.dim in (1, 2, 3)

    def shell() -> nn.Module:
        module = LearnedRegionNorm(
            state.num_features,
            dim=(state.dim if told else None) or 1,
            threshold=limit,
            per_sample=per_sample,
            eps_scaled=eps_scaled,
            eps=state.eps if eps is None else eps,
        )
        module.dim, module.spatial = state.dim, told
        return place(module.to(state.reference()), state)

    return begin(
        state,
        shell,
        _rule(threshold=limit, per_sample=per_sample, eps_scaled=eps_scaled),
        carry=carry,
        eps=eps,
        affine=affine,
        own=LearnedRegionNorm.own,
    )


def read_learned_region_norm(module: nn.Module) -> NormState:
    """Read a LearnedRegionNorm."""
    if not isinstance(module, LearnedRegionNorm):
        raise TypeError(f"expected a LearnedRegionNorm, got {type(module).__name__}")
    own: dict[str, Any] = {
        "threshold": module.threshold,
        "per_sample": module.per_sample,
        "eps_scaled": module.eps_scaled,
    }
    return NormState(
        norm="rn_l",
        kind="region_norm",
        rule=_rule(**own),
        settings={**own, "eps": module.eps, "affine": module.weight is not None},
        **described(module),
    )


ENTRIES = (
    NormEntry(
        name="rn_l",
        aliases=("region_norm_learned", "learned_region_norm"),
        kind="region_norm",
        axis="statistics",
        pooled="N × H·W in each of two learned regions, per channel",
        paper="Yu et al. 2020, arXiv 1911.10375",
        sources=BATCH_SOURCES,
        start=start_learned_region_norm,
        reads={LearnedRegionNorm: read_learned_region_norm},
        options=(
            number("threshold", "where a hole begins; None: 0.8", low=0.0, high=1.0),
            flag("per_sample", False, "regions of each sample by themselves"),
            flag("eps_scaled", True, "a larger eps for a smaller region, as the paper's code"),
            EPS,
            AFFINE,
        ),
        needs=frozenset({"dim"}),
    ),
)
