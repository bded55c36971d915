"""Local context normalization: statistics of a group of channels in a window round each position.

Ortiz, Robinson, Morris, Fuentes, Kiekintveld, Hassan and Jojic, "Local Context Normalization:
Revisiting Local Normalization", CVPR 2020, arXiv 1912.05845.

The window is centred on the position, or as near to it as lies inside of the map, so that all
windows have as many values; a dimension that is shorter than the window is taken whole. Variances
are biased, and gradients go through them. The authors' code differs: its windows are off by one
and leave the first row and column out, a map shorter than the window in one dimension is taken
whole in both, by an unbiased variance, no gradient goes through the statistics of a window, and
the input is overwritten. None of this is done here, so that outputs near the border differ from
those of a network trained by it.

Sums over windows are differences of running sums, in float64 and of values less their group's
mean: of raw values in float32 they cancel. A device without float64 sums in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.affine_norm import AffineNorm
from normswap.norms.declared import declared
from normswap.norms.entry import Option, whole
from normswap.norms.grouped import chosen_groups
from normswap.norms.pool import Pool, Rule
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "LocalContextNorm"]

WINDOW = 227
CHANNELS_PER_GROUP = 2


@dataclass(frozen=True)
class _Window(Pool):
    """A group of one sample's channels in windows of the map.

    Args:
        window: how long they are in every dimension.
    """

    window: int = WINDOW


class LocalContextNorm(AffineNorm):
    """weight · (x - μ) / sqrt(σ² + eps) + bias with μ and σ² of each position's window.

    Args:
        num_features: C.
        channels_per_group: consecutive channels that are pooled. Default 2, as in the paper.
        window: how long the window is in every dimension. Default 227, as in the paper.
        **rest: as for `AffineNorm`.

    Raises:
        DegeneratePooling: at a forward where a window holds a single value.
    """

    spatial = True

    def __init__(
        self,
        num_features: int,
        *,
        channels_per_group: int = CHANNELS_PER_GROUP,
        window: int = WINDOW,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.channels_per_group = channels_per_group
        self.window = window

    def standardize(self, x: Tensor) -> Tensor:
        """Standardize every position by its window."""
        sizes = [min(self.window, length) for length in x.shape[2:]]
        count = self.channels_per_group * math.prod(sizes)
        self.refuse_single_value(count, "use a larger window, or larger groups")
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        groups = self.num_features // self.channels_per_group
        values = x.to(exact).reshape(len(x), groups, self.channels_per_group, *x.shape[2:])
        # Whatever is subtracted from a whole group changes nothing, its gradients included.
        centred = values - values.detach().mean([*range(2, values.ndim)], keepdim=True)
        mean = _summed(centred.sum(2), sizes) / count
        # The mean's square is small beside the other, of values whose group has the mean zero.
        square = _summed(centred.square().sum(2), sizes) / count
        var = (square - mean.square()).clamp(min=0)
        y: Tensor = (centred - mean.unsqueeze(2)) * (var + self.eps).rsqrt().unsqueeze(2)
        return y.flatten(1, 2).to(x.dtype)

    @classmethod
    def chosen(
        cls, state: NormState, carry: Carry, *, channels_per_group: int | None = None, **given: Any
    ) -> dict[str, Any]:
        """Choose groups."""
        groups = chosen_groups(state.num_features, None, channels_per_group, default=_of_two)
        channels = state.num_features // groups
        return super().chosen(state, carry, channels_per_group=channels, **given)

    def pools(self, *, tracks: bool) -> Rule:
        """A group's window."""
        return Rule.always(_Window("group", self.channels_per_group, window=self.window))

    def extra_repr(self) -> str:
        """Say its groups and its window too."""
        return (
            f"{super().extra_repr()}, channels_per_group={self.channels_per_group}, "
            f"window={self.window}"
        )


def _summed(x: Tensor, sizes: list[int]) -> Tensor:
    """Sums over the window of every position of (N, groups, ...), by running sums."""
    for dim, size in enumerate(sizes, start=2):
        length = x.shape[dim]
        if size == length:
            x = x.sum(dim, keepdim=True).expand_as(x)
            continue
        running = x.cumsum(dim)
        before = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), running], dim)
        first = torch.arange(length, device=x.device) - (size - 1) // 2
        first = first.clamp(0, length - size)
        x = before.index_select(dim, first + size) - before.index_select(dim, first)
    return x


def _of_two(num_features: int) -> int:
    """The paper's groups of two channels; of a few more where their number is odd."""
    channels = (size for size in range(2, num_features + 1) if num_features % size == 0)
    return num_features // next(channels, 1)


ENTRIES = (
    declared(
        LocalContextNorm,
        name="lcn",
        aliases=("local_context_norm", "localcontextnorm"),
        kind="local_context_norm",
        axis="statistics",
        pooled="a group of channels × a window of H·W, per sample and position",
        paper="Ortiz et al. 2020, arXiv 1912.05845",
        options=(
            Option("channels_per_group", None, "None: 2, or the least that divides"),
            whole("window", None, "its length in every dimension; None: 227"),
        ),
    ),
)
