"""Learned region normalization: what a network deems a hole is normalized apart from the rest.

Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, "Region Normalization for Image Inpainting", AAAI 2020,
arXiv 1911.10375, the variant RN-L.

A convolution of each position's mean and maximum over the channels tells how much the position
belongs to the holes; from a threshold on it does, which no gradient goes through. Both regions are
standardized by themselves (`normswap.norms.statistics.region`). Gain and offset of positions are
two further convolutions of the same map.

The paper's gain and offset are the same for all channels. Here weight and bias per channel come
on top, so that an affine is not lost, and all three convolutions start at zero, where the paper
draws them: everything is one region then, and the norm a batch norm in training. Gain and offset
learn first, and from the next step on the regions through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.declared import declared
from normswap.norms.entry import number
from normswap.norms.pool import Rule
from normswap.norms.start import Carry
from normswap.norms.state import NormState
from normswap.norms.statistics.region import EPS_SCALED, PER_SAMPLE, RegionNorm, Regions

__all__ = ["ENTRIES", "LearnedRegionNorm"]

THRESHOLD = 0.8
KERNEL = 7


@dataclass(frozen=True)
class _Learned(Regions):
    """Two regions that the norm tells apart.

    Args:
        threshold: by what it does, with what it has learned.
        learned: whether it has learned anything.
    """

    threshold: float = THRESHOLD
    learned: bool = False


class LearnedRegionNorm(RegionNorm):
    """weight · (z · (1 + gain) + offset) + bias, where z is standardized region by region.

    Args:
        num_features: C.
        threshold: from where on a position belongs to the holes. Default 0.8.
        dim: how many dimensions follow the channels. Where there are other than 1 to 3 they are
            seen as one, and an input (N, C) has one position. Default 2.
        **rest: as for `RegionNorm`.

    Attributes:
        region_weight: (1, 2, 7, ...), which tells the regions apart.
        gain_weight: (1, 1, 7, ...), as is offset_weight; gain_bias and offset_bias: (1,).
    """

    own = ("region_weight", "gain_weight", "gain_bias", "offset_weight", "offset_bias")

    def __init__(
        self,
        num_features: int,
        *,
        threshold: float = THRESHOLD,
        dim: int | None = 2,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, dim=dim, **rest)
        self.threshold = threshold
        self.spatial = dim in (1, 2, 3)
        self.kernel_dims = dim if dim in (1, 2, 3) else 1
        kernel = [KERNEL] * self.kernel_dims
        self.region_weight = nn.Parameter(torch.zeros(1, 2, *kernel))
        self.gain_weight = nn.Parameter(torch.zeros(1, 1, *kernel))
        self.gain_bias = nn.Parameter(torch.zeros(1))
        self.offset_weight = nn.Parameter(torch.zeros(1, 1, *kernel))
        self.offset_bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def chosen(cls, state: NormState, carry: Carry, **given: Any) -> dict[str, Any]:
        """Refuse a map whose dimensions nothing tells, as a kernel has to fit them."""
        if state.channel_dim == 1 and state.dim not in (0, 1, 2, 3):
            raise CannotConvert(
                "nothing tells how many dimensions its input has", "give example_inputs"
            )
        return super().chosen(state, carry, **given)

    def pools(self, *, tracks: bool) -> Rule:
        """Both regions, of the batch or of each sample."""
        learned = any(not each.is_meta and each.any() for each in map(self.get_parameter, self.own))
        pool = _Learned(
            self.over, eps_scaled=self.eps_scaled, threshold=self.threshold, learned=learned
        )
        return Rule.always(pool)

    def standardize(self, x: Tensor) -> Tensor:
        """Standardize both regions and apply gain and offset of every position."""
        if x.ndim == 2:
            return self.standardize(x.view(*x.shape, *[1] * self.kernel_dims)).view_as(x)
        with torch.autocast(x.device.type, enabled=False):
            seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            likely = self._convolved(seen, self.region_weight, None).sigmoid()
            gain = self._convolved(likely, self.gain_weight, self.gain_bias)
            offset = self._convolved(likely, self.offset_weight, self.offset_bias)
        z = self.apart(x, (likely.detach() >= self.threshold).to(x.dtype))
        return z * (1 + gain) + offset

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.kernel_dims - 1]
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = convolve(x, weight.to(x.dtype), bias, padding=KERNEL // 2)
        return y

    def extra_repr(self) -> str:
        """Say how regions are told apart, too."""
        return f"{super().extra_repr()}, threshold={self.threshold}, per_sample={self.per_sample}"


ENTRIES = (
    declared(
        LearnedRegionNorm,
        name="rn_l",
        aliases=("region_norm_learned", "learned_region_norm"),
        kind="region_norm",
        axis="statistics",
        pooled="N × H·W in each of two learned regions, per channel",
        paper="Yu et al. 2020, arXiv 1911.10375",
        options=(
            number("threshold", "where a hole begins; None: 0.8", low=0.0, high=1.0),
            PER_SAMPLE,
            EPS_SCALED,
        ),
        needs={"dim"},
    ),
)
