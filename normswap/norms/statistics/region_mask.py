"""Region normalization by a mask: what is inside is normalized apart from the rest.

Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, "Region Normalization for Image Inpainting", AAAI 2020,
arXiv 1911.10375, the variant RN-B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import per_channel
from normswap.norms.declared import declared
from normswap.norms.entry import flag
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.inputs.maps import resized
from normswap.norms.inputs.norm import InputNorm
from normswap.norms.pool import Rule
from normswap.norms.statistics.region import EPS_SCALED, PER_SAMPLE, RegionNorm, Regions

__all__ = ["ENTRIES", "MaskedRegionNorm"]


@dataclass(frozen=True)
class _Masked(Regions):
    """What is inside a mask, and the rest.

    Args:
        official_bias: whether both biases are added everywhere.
    """

    official_bias: bool = False


class MaskedRegionNorm(InputNorm, RegionNorm):
    """(weight + Δw) · z + bias + Δb, with z standardized, and Δw and Δb learned, by region.

    The mask is 1 inside, and resized to the map at hand (nearest).

    Args:
        num_features: C.
        official_bias: whether both Δb are added everywhere, as in the authors' code. Default no:
            each in its region, as in the paper.
        **rest: as for `RegionNorm`.

    Attributes:
        inside_weight: (C,), zero at first, as are inside_bias, outside_weight, outside_bias.
    """

    own = ("inside_weight", "inside_bias", "outside_weight", "outside_bias")
    spatial = True

    def __init__(self, num_features: int, *, official_bias: bool = False, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.official_bias = official_bias
        for name in self.own:
            self.register_parameter(name, nn.Parameter(torch.zeros(num_features)))

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """The mask."""
        return (ExtraInput("mask", (Form(("N", 1, "*"), "zeros and ones"),)),)

    @property
    def deltas(self) -> tuple[str, ...]:
        """What the regions add to weight and bias."""
        return self.own

    def pools(self, *, tracks: bool) -> Rule:
        """Both regions, of the batch or of each sample."""
        return Rule.always(
            _Masked(self.over, eps_scaled=self.eps_scaled, official_bias=self.official_bias)
        )

    def standardize(self, x: Tensor) -> Tensor:
        """Standardize both regions."""
        return self.apart(x, self._inside(x))

    def with_affine(self, z: Tensor) -> Tensor:
        """Weight and bias, with what each region adds to them."""
        inside = self._inside(z)
        inner_weight, inner_bias, outer_weight, outer_bias = (
            per_channel(getattr(self, name).to(z.dtype), z) for name in self.own
        )
        weight = z.new_ones(()) if self.weight is None else per_channel(self.weight, z)
        weight = weight + inside * inner_weight + (1 - inside) * outer_weight
        bias = z.new_zeros(()) if self.bias is None else per_channel(self.bias, z)
        if self.official_bias:
            return z * weight + (bias + inner_bias + outer_bias)
        return z * weight + (bias + inside * inner_bias + (1 - inside) * outer_bias)

    def _inside(self, x: Tensor) -> Tensor:
        return self.resized("mask", x, resized, x.dtype)


ENTRIES = (
    declared(
        MaskedRegionNorm,
        name="rn_b",
        aliases=("region_norm", "region_norm_basic"),
        kind="region_norm",
        axis="statistics",
        pooled="N × H·W inside a mask and outside, per channel",
        paper="Yu et al. 2020, arXiv 1911.10375",
        options=(
            PER_SAMPLE,
            EPS_SCALED,
            flag("official_bias", False, "both biases everywhere, as the paper's code"),
        ),
        inputs=("mask",),
    ),
)
