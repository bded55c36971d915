"""Semantic region-adaptive normalization: a style for each region of a label map.

Zhu, Abdal, Qin and Wonka, "SEAN: Image Synthesis with Semantic Region-Adaptive Normalization",
CVPR 2020, arXiv 1911.12861.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.norms.affine.conditioned import ON_ANY_BASE
from normswap.norms.affine.spatial import (
    KERNEL,
    NUM_LABELS,
    SpatiallyAdaptiveNorm,
    label_map,
    zero_conv,
)
from normswap.norms.affine_norm import per_channel
from normswap.norms.declared import declared
from normswap.norms.entry import whole
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.passes import work_dtype

__all__ = ["ENTRIES", "RegionStyleNorm"]

STYLE = 512


class RegionStyleNorm(SpatiallyAdaptiveNorm):
    """SPADE, blended with gain and offset from a style code of the region at each position.

    Each code goes through a linear layer of its region and a ReLU, and is laid out over the
    region; a convolution each makes gain and offset of that map. Where regions overlap the
    highest label wins, where there is none the map is zero. The shares of the two are sigmoids
    of ``gain_blend`` and ``offset_blend``, a half each at first.

    The input gets noise before it is standardized, the same for all channels, times
    ``noise_weight``, which starts at zero. It is drawn in eval mode, too.

    The styles are not laid out: a convolution of a map that is constant in each region is the
    sum over the regions of a convolution of its mask, with a kernel for each sample.

    Args:
        num_features: C.
        num_labels: K.
        style_dim: L, the size of a code. Default 512.
        **rest: as for `SpatiallyAdaptiveNorm`.
    """

    own = (
        *("style_weight", "style_bias", "style_gain_conv", "style_offset_conv"),
        *("gain_blend", "offset_blend", "noise_weight"),
    )

    def __init__(
        self,
        num_features: int,
        *,
        num_labels: int | None = None,
        style_dim: int = STYLE,
        dim: int | None = 2,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, num_labels=num_labels, dim=dim, **rest)
        self.style_dim = style_dim
        regions = self.num_labels
        bound = style_dim**-0.5  # as a linear layer's
        shape = (regions, style_dim, style_dim)
        self.style_weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.style_bias = nn.Parameter(torch.empty(shape[:2]).uniform_(-bound, bound))
        sizes = (dim, style_dim, num_features, self.kernel_size)
        self.style_gain_conv = zero_conv(*sizes)
        self.style_offset_conv = zero_conv(*sizes)
        self.gain_blend = nn.Parameter(torch.zeros(()))
        self.offset_blend = nn.Parameter(torch.zeros(()))
        self.noise_weight = nn.Parameter(torch.zeros(num_features))

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """The label map and a code for each label."""
        form = Form(("N", self.num_labels, self.style_dim), "numbers")
        return label_map(self.num_labels), ExtraInput("style", (form,))

    @property
    def deltas(self) -> tuple[str, ...]:
        """All convolutions for gain and offset, and the noise's weight."""
        styles = (f"style_{n}_conv.{t}" for n in ("gain", "offset") for t in ("weight", "bias"))
        return (*super().deltas, *styles, "noise_weight")

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        values = x.to(work_dtype(x))
        noise = torch.randn_like(values[:, :1])
        noisy = values + per_channel(self.noise_weight.to(values.dtype), x) * noise
        return super().normalize(noisy).to(x.dtype)

    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A blend of what label map and styles say."""
        made = []
        regions, codes = self._regions(x), self._codes(x)
        blends = self.gain_blend, self.offset_blend
        layers = self.style_gain_conv, self.style_offset_conv
        for of_labels, blend, layer in zip(super().predicted(x), blends, layers, strict=True):
            share = blend.sigmoid()
            of_styles = _laid_out(regions, codes, layer)
            made.append(share * of_styles + (1 - share) * of_labels)
        return made[0], made[1]

    def _codes(self, x: Tensor) -> Tensor:
        """Each region's code after its layer, (N, K, L)."""
        _, style = self.called_with("style", x)
        given = style.to(self.style_weight.dtype)
        codes: Tensor = torch.einsum("nkl,kml->nkm", given, self.style_weight) + self.style_bias
        return codes.relu()

    def _regions(self, x: Tensor) -> Tensor:
        """1 where a label is the highest at a position, (N, K, ...)."""
        call, _ = self.called_with("segmap", x)
        labels = self.labels(x)

        def make() -> Tensor:
            order = torch.arange(1, self.num_labels + 1, device=labels.device)
            there = (labels.detach() != 0) * order.view(-1, *[1] * (labels.ndim - 2))
            highest = F.one_hot(there.amax(1), self.num_labels + 1)
            return highest.movedim(-1, 1)[:, 1:].to(labels.dtype)

        return call.once(("regions", self.num_labels, labels.shape[2:], labels.dtype), make)


def _laid_out(regions: Tensor, codes: Tensor, layer: Any) -> Tensor:
    """The convolution of a map that has in each region the region's code.

    Args:
        regions: masks, (N, K, ...).
        codes: (N, K, L).
        layer: a convolution of L channels to C.
    """
    samples = len(regions)
    kernels = torch.einsum("cl...,nkl->nck...", layer.weight, codes.to(layer.weight.dtype))
    together = regions.reshape(1, -1, *regions.shape[2:])
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[regions.ndim]
    y = convolve(together, kernels.flatten(0, 1), padding=layer.padding, groups=samples)
    laid: Tensor = y.view(samples, -1, *regions.shape[2:])
    return laid + per_channel(layer.bias, laid)


ENTRIES = (
    declared(
        RegionStyleNorm,
        name="sean",
        aliases=("semantic_region_adaptive_norm",),
        kind="batch_norm",
        axis="affine",
        pooled="as its base",
        paper="Zhu et al. 2020, arXiv 1911.12861",
        options=(
            NUM_LABELS,
            whole("style_dim", STYLE, "size of a region's style code"),
            whole("hidden_dim", 128, "channels between its layers of the label map"),
            KERNEL,
            *ON_ANY_BASE,
        ),
        inputs=("segmap", "style"),
        needs={"dim"},
    ),
)
