"""The two forms of EvoNorm that the paper recommends: B0 by the batch, S0 by the sample.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv
2004.02967; what they share is in `normswap.norms.standardization.evolved`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import per_channel
from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.grouped import GroupedNorm
from normswap.norms.pool import per_group
from normswap.norms.standardization.evolved import EvoNorm
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "EvoNormB0", "EvoNormS0"]

MOST_GROUPS = 32


class EvoNormB0(EvoNorm):
    """weight · x / max(sqrt(σ² + eps), v · x + sqrt(s² + eps)) + bias.

    σ² is the batch's biased variance, in eval mode the mean of those seen in training; s² is that
    of the sample's channel, in both.

    Args:
        num_features: C.
        **rest: as for `EvoNorm`.

    Attributes:
        running_var: (C,), biased; starts at 1.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    tracks = True
    retells = True
    synchronizes = True
    running_var: Tensor

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def evolved(self, x: Tensor, v: Tensor) -> Tensor:
        """Divide by the larger of two deviations, of which one grows with the value."""
        own = (_variance(x, 1) + self.eps).sqrt()
        return x / torch.maximum(per_channel((self._of_batch(x) + self.eps).sqrt(), x), v * x + own)

    def _of_batch(self, x: Tensor) -> Tensor:
        """The variance of the batch, (C,), or what was kept of it."""
        if not self.training:
            return self.running_var.to(x.dtype)
        dims, count = [0, *range(2, x.ndim)], x.numel() // self.num_features
        divisor = max(count, 1)
        center = self.over_ranks(x.sum(dims) / divisor, count)
        away = (x - per_channel(center, x)).square().sum(dims) / divisor
        var = self.over_ranks(away, count)
        if count or self.pools_ranks:
            self.track(running_var=var)
        return var

    def sketched(self, x: Tensor, v: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Both deviations are the channel's."""
        deviation = (var + self.eps).sqrt()[:, None]
        return x / torch.maximum(deviation, v * x + deviation)

    def slope_unit(self, var: Tensor) -> Tensor:
        """A slope is a number here."""
        return torch.ones_like(var)

    def kept(self, state: NormState) -> dict[str, Tensor]:
        """The source's running variance."""
        if state.running_var is None:
            raise ValueError("the source keeps no running statistics")
        kept = {"running_var": state.running_var.detach().clone()}
        if state.num_batches_tracked is not None:
            kept["num_batches_tracked"] = state.num_batches_tracked.detach().clone()
        return kept


class EvoNormS0(GroupedNorm, EvoNorm):
    """weight · x · sigmoid(v · x) / sqrt(σ² + eps) + bias; σ² of a sample's group of channels.

    Args:
        num_features: C.
        num_groups: how many groups of consecutive channels; by default the largest divisor of C
            up to 32, as in the paper's code.
        **rest: as for `EvoNorm`.
    """

    nearest_act = nn.SiLU

    @staticmethod
    def default_groups(num_features: int) -> int:
        """The largest divisor up to 32."""
        return max(g for g in range(1, MOST_GROUPS + 1) if num_features % g == 0)

    def evolved(self, x: Tensor, v: Tensor) -> Tensor:
        """Divide what the slope activates by the group's deviation."""
        var = _variance(x, self.channels_per_group)
        return x * (v * x).sigmoid() * (var + self.eps).rsqrt()

    def sketched(self, x: Tensor, v: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The deviation is what groups are expected to have."""
        _, spread = per_group(self.channels_per_group).expected(mean, var)
        return x * (v * x).sigmoid() * (spread + self.eps).rsqrt()[:, None]

    def slope_unit(self, var: Tensor) -> Tensor:
        """A slope is by the channel's deviation."""
        return (var + self.eps).rsqrt()


def _variance(x: Tensor, channels: int) -> Tensor:
    """The biased variance of each sample's group of channels, (N, C, 1, ...)."""
    groups = x.reshape(len(x), x.shape[1] // channels, channels, *x.shape[2:])
    var: Tensor = groups.var([*range(2, groups.ndim)], correction=0, keepdim=True)
    return var.expand(-1, -1, channels, *[-1] * (x.ndim - 2)).flatten(1, 2)


_NONLINEARITY = Option(
    "nonlinearity",
    None,
    "activate too; None: where an activation alone follows",
    "True or False",
    lambda value: isinstance(value, bool),
)

ENTRIES = (
    declared(
        EvoNormB0,
        name="evonorm_b0",
        aliases=("evonormb0", "evonorm2d_b0"),
        kind="evonorm",
        axis="standardization",
        pooled="N × H·W per channel, and H·W per sample and channel",
        paper="Liu et al. 2020, arXiv 2004.02967",
        options=(_NONLINEARITY,),
        needs=("activation",),
    ),
    declared(
        EvoNormS0,
        name="evonorm_s0",
        aliases=("evonorms0", "evonorm2d_s0"),
        kind="evonorm",
        axis="standardization",
        pooled="a group of channels × H·W, per sample",
        paper="Liu et al. 2020, arXiv 2004.02967",
        options=(
            _NONLINEARITY,
            Option("num_groups", None, "None: the largest divisor ≤ 32"),
            Option("channels_per_group", None, "instead of num_groups"),
        ),
        needs=("activation",),
    ),
)
