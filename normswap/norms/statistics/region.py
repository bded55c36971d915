"""Norms whose positions are in two regions, each standardized by itself.

Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, "Region Normalization for Image Inpainting", AAAI 2020,
arXiv 1911.10375. `normswap.norms.statistics.region_mask` has the one that is given its regions, and
`normswap.norms.statistics.region_learned` the one that learns them.

Each region is standardized by its own statistics, per channel, over the batch, or over each sample
with ``per_sample``. In the authors' code eps is as many times larger as the region is smaller than
the whole, so that small regions are damped; ``eps_scaled=False`` adds eps as it is. A region of no
values has no output to give. Nothing is kept: in eval mode samples still depend on their batch.
With ``sync`` the batch of training is that of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.errors import OptionError
from normswap.norms.affine_norm import AffineNorm
from normswap.norms.entry import flag
from normswap.norms.pool import Over, Pool

__all__ = ["EPS_SCALED", "PER_SAMPLE", "RegionNorm", "Regions"]

PER_SAMPLE = flag("per_sample", False, "regions of each sample by themselves")
EPS_SCALED = flag("eps_scaled", True, "a larger eps for a smaller region, as the paper's code")


@dataclass(frozen=True)
class Regions(Pool):
    """Two regions of the batch, or of each sample, per channel.

    Args:
        eps_scaled: whether small regions have a larger eps.
    """

    eps_scaled: bool = True


class RegionNorm(AffineNorm):
    """A norm that standardizes two regions by themselves.

    Args:
        num_features: C.
        per_sample: whether regions are those of each sample. Default no.
        eps_scaled: whether eps is divided by the region's share of the values. Default yes.
        **rest: as for `AffineNorm`; eps is added to the variance.

    Raises:
        OptionError: ``sync`` and ``per_sample`` are both set.
        DegeneratePooling: at a forward with a single value for each channel.
    """

    synchronizes = True

    def __init__(
        self,
        num_features: int,
        *,
        per_sample: bool = False,
        eps_scaled: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        if per_sample and self.sync:
            raise OptionError(
                "regions of each sample lie on one rank: leave out sync or per_sample"
            )
        self.per_sample = per_sample
        self.eps_scaled = eps_scaled

    @property
    def over(self) -> Over:
        """What regions are regions of."""
        return "group" if self.per_sample else "batch"

    def apart(self, x: Tensor, inside: Tensor) -> Tensor:
        """The values (N, C, ...) inside and outside of a region standardized by themselves.

        Args:
            x: the values.
            inside: 1 in the region and 0 elsewhere, (N, 1, ...).
        """
        regions = inside, 1 - inside
        one, other, *means = self._means(*regions, *(x * region for region in regions))
        # Of a region of no values nothing is asked.
        shares = [share.where(share > 0, 1) for share in (one, other)]
        centred = [
            (x - mean / share) * region
            for region, share, mean in zip(regions, shares, means, strict=True)
        ]
        squares = self._means(*(each.square() for each in centred))
        z = [
            each * (square / share + (self.eps / share if self.eps_scaled else self.eps)).rsqrt()
            for each, share, square in zip(centred, shares, squares, strict=True)
        ]
        return z[0] + z[1]

    def _means(self, *values: Tensor) -> list[Tensor]:
        """The mean of each over all that statistics are pooled over, in one exchange of ranks."""
        dims = [*([] if self.per_sample else [0]), *range(2, values[0].ndim)]
        count = math.prod([values[0].shape[dim] for dim in dims])
        means = [each.sum(dims, keepdim=True) / max(count, 1) for each in values]
        if self.per_sample:
            self.refuse_single_value(count, "use a larger map")
            return means
        whole = self.over_ranks(torch.cat(means, 1), count)
        return list(torch.split(whole, [mean.shape[1] for mean in means], 1))
