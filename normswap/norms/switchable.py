"""Switchable normalization: a learned mixture of instance, layer and batch normalization.

Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable Normalization",
ICLR 2019, arXiv 1806.10779.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.declared import declared
from normswap.norms.entry import Option, flag
from normswap.norms.measured import MeasuredNorm, pooled
from normswap.norms.pool import BATCH, RUNNING, Pool, Rule, per_group

__all__ = ["ENTRIES", "SwitchableNorm"]

KAPPA = 10.0


class SwitchableNorm(MeasuredNorm):
    """weight · (x - μ) / sqrt(σ² + eps) + bias, where μ = Σ pₖ μₖ and σ² = Σ qₖ σₖ².

    The three μₖ and σₖ² are those of the sample's channel, of the sample and of the batch (in
    eval mode the running statistics); p and q are the softmax of ``mean_weight`` and of
    ``var_weight``. The gradient goes through all of it.

    Args:
        num_features: C.
        unbiased: take each channel's variance as unbiased, n/(n - 1) times what it is of n
            positions, in all three and in the running variance, as the paper's code does. A
            single position is taken as it is. Default yes.
        kappa: the batch's logit at the start; the others are zero. 0 mixes evenly, as the paper
            starts; default 10, which leaves 1e-4 to the others.
        **rest: as for `MeasuredNorm`.
    """

    own = ("mean_weight", "var_weight")

    def __init__(
        self, num_features: int, *, unbiased: bool = True, kappa: float = KAPPA, **rest: Any
    ) -> None:
        super().__init__(num_features, **rest)
        self.unbiased = unbiased
        self.kappa = kappa
        self.mean_weight = nn.Parameter(_logits(kappa))
        self.var_weight = nn.Parameter(_logits(kappa))

    def within(self, positions: int) -> float:
        """What makes a channel's variance unbiased, if that is asked for."""
        return positions / (positions - 1) if self.unbiased and positions > 1 else 1.0

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Mix the statistics of channel, sample and batch."""
        of_batch = self.over_batch(mean, var, positions)
        var = var * self.within(positions)
        of_sample = pooled(mean, var, 1)
        p = self.mean_weight.to(mean.dtype).softmax(0)
        q = self.var_weight.to(mean.dtype).softmax(0)
        return self.standardized(
            p[0] * mean + (p[1] * of_sample[0] + p[2] * of_batch[0]),
            q[0] * var + (q[1] * of_sample[1] + q[2] * of_batch[1]),
        )

    def pools(self, *, tracks: bool) -> Rule:
        """A mixture, by the shares that it has learned."""
        logits: tuple[Tensor, Tensor] = (self.mean_weight, self.var_weight)
        if self.mean_weight.is_meta:
            logits = _logits(self.kappa), _logits(self.kappa)
        p, q = (each.detach().double().softmax(0).tolist() for each in logits)

        def mixture(batch: Pool) -> Pool:
            pools = (per_group(1), per_group(self.num_features), batch)
            return Pool("mixture", shares=tuple(zip(pools, p, q, strict=True)))

        return Rule(mixture(BATCH), mixture(RUNNING if tracks else BATCH))


def _logits(kappa: float) -> Tensor:
    return torch.tensor([0.0, 0.0, kappa])


def _is_logit(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100


ENTRIES = (
    declared(
        SwitchableNorm,
        name="sn",
        aliases=("switchable_norm", "switchablenorm"),
        kind="switchable_norm",
        axis="statistics",
        pooled="a learned mixture of H·W, C × H·W per sample and N × H·W per channel",
        paper="Luo et al. 2019, arXiv 1806.10779",
        options=(
            flag("unbiased", True, "unbiased variances of a channel, as the paper's code"),
            Option("kappa", KAPPA, "the batch's logit at first; 0: even", "0 to 100", _is_logit),
        ),
    ),
)
