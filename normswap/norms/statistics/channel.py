"""Channel normalization: every channel of one sample by itself, with the unbiased variance.

Dai and Heckel, "Channel Normalization in Convolutional Neural Network avoids Vanishing
Gradients", ICML 2019 workshop on deep phenomena, arXiv 1907.09539.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import flag
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import Pool, Rule

__all__ = ["ENTRIES", "ChannelNorm"]


class ChannelNorm(MeasuredNorm):
    """weight · (x - μ) / sqrt(σ² + eps) + bias with μ and σ² over the positions of a channel.

    Args:
        num_features: C.
        unbiased: whether σ² is the unbiased variance, as in the paper's code; with the biased one
            it is instance normalization. Default yes.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward on maps of one position.
    """

    tracks = False
    synchronizes = False

    def __init__(self, num_features: int, *, unbiased: bool = True, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.unbiased = unbiased

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize each channel by itself."""
        self.refuse_single_value(positions, "use a larger map")
        correction = positions / (positions - 1) if self.unbiased else 1.0
        return self.standardized(mean, var * correction)

    def pools(self, *, tracks: bool) -> Rule:
        """Each channel of a sample."""
        return Rule.always(Pool("group", unbiased=self.unbiased))


ENTRIES = (
    declared(
        ChannelNorm,
        name="cn",
        aliases=("channel_norm", "channelnorm"),
        kind="channel_norm",
        axis="statistics",
        pooled="H·W, per sample and channel",
        paper="Dai and Heckel 2019, arXiv 1907.09539",
        options=(flag("unbiased", True, "the unbiased variance, as the paper's code"),),
    ),
)
