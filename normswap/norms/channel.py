"""Channel normalization: every channel of one sample by itself, with the unbiased variance.

Dai and Heckel, "Channel Normalization in Convolutional Neural Network avoids Vanishing
Gradients", ICML 2019 workshop on deep phenomena, arXiv 1907.09539.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normswap.norms.batch import BATCH_SOURCES
from normswap.norms.entry import AFFINE, EPS, NormEntry, flag
from normswap.norms.measured import MeasuredNorm, described, furnished
from normswap.norms.pool import Pool, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

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

    def __init__(self, num_features: int, *, unbiased: bool = True, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.unbiased = unbiased

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize each channel by itself."""
        self.refuse_single_value(positions, "use a larger map")
        correction = positions / (positions - 1) if self.unbiased else 1.0
        return self.standardized(mean, var * correction)


def _rule(*, unbiased: bool) -> Rule:
    return Rule.always(Pool("group", unbiased=unbiased))


def start_channel_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
    unbiased: bool = True,
) -> Start:
    """Start a ChannelNorm; its statistics are expected to be the running ones, so affines fit."""

    def shell() -> nn.Module:
        module = ChannelNorm(state.num_features, unbiased=unbiased)
        return furnished(module, state, eps=eps)

    return begin(state, shell, _rule(unbiased=unbiased), carry=carry, eps=eps, affine=affine)


def read_channel_norm(module: nn.Module) -> NormState:
    """Read a ChannelNorm."""
    if not isinstance(module, ChannelNorm):
        raise TypeError(f"expected a ChannelNorm, got {type(module).__name__}")
    return NormState(
        norm="cn",
        kind="channel_norm",
        rule=_rule(unbiased=module.unbiased),
        settings={
            "eps": module.eps,
            "affine": module.weight is not None,
            "unbiased": module.unbiased,
        },
        **described(module),
    )


ENTRIES = (
    NormEntry(
        name="cn",
        aliases=("channel_norm", "channelnorm"),
        kind="channel_norm",
        axis="statistics",
        pooled="H·W, per sample and channel",
        paper="Dai and Heckel 2019, arXiv 1907.09539",
        sources=BATCH_SOURCES,
        start=start_channel_norm,
        reads={ChannelNorm: read_channel_norm},
        options=(EPS, AFFINE, flag("unbiased", True, "the unbiased variance, as the paper's code")),
    ),
)
