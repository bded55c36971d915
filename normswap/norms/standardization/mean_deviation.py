"""L1 batch normalization: the mean absolute deviation takes the place of the standard one.

Wu, Li, Deng, Liu, Xie and Shi, "L1-Norm Batch Normalization for Efficient Training of Deep Neural
Networks", 2018, arXiv 1802.09769; Hoffer, Banner, Golan and Soudry, "Norm matters", NeurIPS 2018,
arXiv 1803.01814.

The mean absolute deviation times sqrt(π/2) is the standard deviation of Gaussian values, and eps
is added to that product, under no root. Of other values, as behind a ReLU, it is something else:
a norm that evaluated as the source did drifts from it in training. What is kept is the scale, not
its inverse as in the authors' code, whose average is biased; it starts at 1, and no number of
values corrects it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.affine_norm import per_channel
from normswap.norms.declared import declared
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.precision import precise
from normswap.norms.tracked import TrackedNorm

__all__ = ["ENTRIES", "L1BatchNorm"]

GAUSSIAN = math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class _Deviation(Pool):
    """The batch, by its mean absolute deviation and an eps beside it."""

    over: Over = "batch"
    eps: float = 1e-5


class L1BatchNorm(TrackedNorm):
    """weight · (x - μ) / (sqrt(π/2) · mean |x - μ| + eps) + bias, both means over the batch.

    Args:
        num_features: C.
        **rest: as for `TrackedNorm`; eps is added to the scale.

    Attributes:
        running_mean: (C,).
        running_scale: (C,), what sqrt(π/2) · mean |x - μ| was in training.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_scale",)
    absorbs_eps = True
    running_mean: Tensor
    running_scale: Tensor

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_scale", torch.ones(num_features))

    def standardize(self, x: Tensor) -> Tensor:
        """Divide by the batch's mean absolute deviation, or by what was kept of it."""
        if self.training:
            centre, scale = self._measured(x)
        else:
            centre, scale = self.running_mean.to(x.dtype), self.running_scale.to(x.dtype)
        return (x - per_channel(centre, x)) / per_channel(scale + self.eps, x)

    def _measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the batch, (C,) each; what is kept follows."""
        dims, count = [0, *range(2, x.ndim)], x.numel() // self.num_features
        divisor = max(count, 1)
        centre = self.over_ranks(x.sum(dims) / divisor, count)
        distance = (x - per_channel(centre, x)).abs()
        scale = GAUSSIAN * self.over_ranks(distance.sum(dims) / divisor, count)
        if count or self.pools_ranks:
            self.track(running_mean=centre, running_scale=scale)
        return centre, scale

    def pools(self, *, tracks: bool) -> Rule:
        """The batch; in eval mode what was kept."""
        return Rule(_Deviation(eps=self.eps), RUNNING)

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The scale that divides as a variance did: sqrt(var + eps of the source) - eps."""
        scale = ((var + eps).sqrt() - self.eps).clamp(min=0)
        return {"running_mean": mean, "running_scale": scale}

    def retold(self) -> dict[str, Tensor]:
        """The variance that would divide as the scale does."""
        var = (precise(self.running_scale) + self.eps).square() - self.eps
        return {"running_var": var.to(self.running_scale.dtype)}


ENTRIES = (
    declared(
        L1BatchNorm,
        name="l1_bn",
        aliases=("l1_batch_norm", "l1batchnorm"),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W, per channel, by the mean absolute deviation",
        paper="Wu et al. 2018, arXiv 1802.09769",
    ),
)
