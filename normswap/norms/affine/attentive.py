"""Attentive normalization for image generation: a residual, normalized in learned soft regions.

Wang, Chen, Zhang, Sun and Jia, "Attentive Normalization for Conditional Image Generation", CVPR
2020, arXiv 2004.03828. Another method than the feature attention of the same name.

Every position belongs to each of n regions by a share, from two things: a linear map of its
channels, and how it agrees with what lies at n places of the map. Places are drawn anew at every
forward in training, the same for the whole batch; in eval mode they are evenly spaced, where the
authors' code draws too and answers differently each time. A third linear map is standardized in
every region of each sample, and added to the input times a learned factor that starts at zero.
So nothing is normalized at first, and nothing else learns in the first step.

The released code takes a mean where the weighted sum is meant, and the squares of masked values
instead of masked deviations, so that its statistics change with the resolution: ``official=True``
does that too. What keeps the regions apart, `AttentiveNorm.orthogonality`, is for the training
loop to add to its loss; the paper weighs it by 1e-3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import AffineNorm
from normswap.norms.declared import declared
from normswap.norms.entry import flag, whole
from normswap.norms.pool import Curve, Rule

__all__ = ["ENTRIES", "AttentiveNorm"]

REGIONS = 16
TEMPERATURE = 10.0
TINY = 1e-7


class AttentiveNorm(AffineNorm):
    """a + residual · Σᵢ Sᵢ · (v - μᵢ) / (σᵢ + 1e-7), where a = weight · x + bias.

    Sᵢ is the share of region i at a position, v a linear map of a, and μᵢ and σᵢ are its mean and
    deviation over a sample's positions, weighted by Sᵢ.

    Args:
        num_features: C.
        num_regions: n. Default 16.
        official: take statistics as the released code does. Default no.
        **rest: as for `AffineNorm`; eps is only kept for a conversion to a norm that has one.

    Attributes:
        key_weight: (C // 8, C), as is query_weight; key_bias and query_bias: (C // 8,); one row
            where there are fewer than eight channels.
        value_weight: (C, C); value_bias: (C,).
        share_weight: (n, C), starts normal.
        share_scale: (n,), how much agreement counts, taken as from 0 to 1; starts at 0.1.
        residual: (), starts at 0.
    """

    own = (
        "key_weight",
        "key_bias",
        "query_weight",
        "query_bias",
        "value_weight",
        "value_bias",
        "share_weight",
        "share_scale",
        "residual",
    )
    eps_option = None

    def __init__(
        self,
        num_features: int,
        *,
        num_regions: int = REGIONS,
        official: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.num_regions = num_regions
        self.official = official
        # By a generator of its own, so that conversions of one model are all the same.
        generator = torch.Generator().manual_seed(0)
        bound = 1 / math.sqrt(num_features)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)

        narrow = max(num_features // 8, 1)
        self.key_weight, self.key_bias = drawn(narrow, num_features), drawn(narrow)
        self.query_weight, self.query_bias = drawn(narrow, num_features), drawn(narrow)
        self.value_weight, self.value_bias = drawn(num_features, num_features), drawn(num_features)
        regions = torch.randn(num_regions, num_features, generator=generator)
        self.share_weight = nn.Parameter(regions)
        self.share_scale = nn.Parameter(torch.full((num_regions,), 0.1))
        self.residual = nn.Parameter(torch.zeros(()))

    def standardize(self, x: Tensor) -> Tensor:
        """Leave the input: gain and offset come first here."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Apply gain and offset, and add what is normalized region by region."""
        values = self.standardize(x.to(torch.promote_types(x.dtype, torch.float32)))
        front = self.with_affine(values)
        with torch.autocast(x.device.type, enabled=False):
            values = front.flatten(2) if front.ndim > 2 else front.unsqueeze(2)
            added = self.residual.to(values.dtype) * self._apart(values)
        return (front + added.view(front.shape)).to(x.dtype)

    def orthogonality(self) -> Tensor:
        """How far the maps to the regions are from orthonormal: |W Wᵀ - 1|², a scalar."""
        gram = self.share_weight @ self.share_weight.mT
        return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()

    def _apart(self, x: Tensor) -> Tensor:
        """Standardize a map of x (N, C, L) in every region."""
        shares = self._shares(x)
        value = self._mapped(x, "value")
        if not self.official:
            value = value - value.detach().mean(2, keepdim=True)  # what differs by this is equal
        total = shares.sum(2)[:, :, None]
        first = torch.einsum("nrl,ncl->nrc", shares, value)
        if self.official:
            count = total + TINY
            mean = first / x.shape[2] / count
            second = torch.einsum("nrl,ncl->nrc", shares.square(), value.square())
            var = (second - 2 * mean * first + x.shape[2] * mean.square()) / count
        else:
            mean = first / total
            second = torch.einsum("nrl,ncl->nrc", shares, value.square())
            var = second / total - mean.square()
        gain = 1 / (var.clamp(min=TINY**3).sqrt() + TINY)
        scaled = torch.einsum("nrl,nrc->ncl", shares, gain) * value
        return scaled - torch.einsum("nrl,nrc->ncl", shares, gain * mean)

    def _shares(self, x: Tensor) -> Tensor:
        """How much each position belongs to each region, (N, n, L)."""
        places = self._places(x.shape[2], x.device)
        keys = self._mapped(x, "key").index_select(2, places)
        agreement = torch.einsum("nkr,nkl->nrl", keys, self._mapped(x, "query"))
        scale = self.share_scale.to(x.dtype).clamp(0, 1)[:, None]
        logits = torch.einsum("rc,ncl->nrl", self.share_weight.to(x.dtype), x)
        shares: Tensor = ((scale * agreement + logits) / TEMPERATURE).softmax(1)
        return shares

    def _places(self, length: int, device: torch.device) -> Tensor:
        """The places that positions are compared with: drawn, or in eval mode evenly spaced."""
        if self.training:
            return torch.randint(length, (self.num_regions,), device=device)
        steps = torch.arange(self.num_regions, device=device)
        return (2 * steps + 1) * length // (2 * self.num_regions)

    def _mapped(self, x: Tensor, name: str) -> Tensor:
        """One of the three linear maps of the channels."""
        weight: Tensor = getattr(self, f"{name}_weight")
        bias: Tensor = getattr(self, f"{name}_bias")
        mapped: Tensor = torch.einsum("oc,ncl->nol", weight.to(x.dtype), x)
        return mapped + bias.to(x.dtype)[:, None]

    def pools(self, *, tracks: bool) -> Rule:
        """Nothing, gain and offset alone, until it has learned to add."""
        adds = not self.residual.is_meta and bool(self.residual.detach() != 0)
        return Rule.always(Curve(curve="attentive" if adds else "linear"))

    def extra_repr(self) -> str:
        """Say how many regions there are, too."""
        return f"{self.num_features}, num_regions={self.num_regions}"


ENTRIES = (
    declared(
        AttentiveNorm,
        name="an_wang",
        aliases=("attentive_norm_wang",),
        kind="attentive_norm",
        axis="affine",
        pooled="H·W in soft learned regions, per sample and channel, as a residual",
        paper="Wang et al. 2020, arXiv 2004.03828",
        options=(
            whole("num_regions", None, "how many regions; None: 16"),
            flag("official", False, "statistics as the released code takes them"),
        ),
    ),
)
