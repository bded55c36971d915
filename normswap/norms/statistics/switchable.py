"""Switchable normalization: a learned mixture of instance, layer and batch normalization.

Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable Normalization",
ICLR 2019, arXiv 1806.10779.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.declared import declared
from normswap.norms.entry import Option, flag
from normswap.norms.measured import MeasuredNorm, pooled
from normswap.norms.pool import BATCH, RUNNING, Pool, Rule, per_group

__all__ = ["ENTRIES", "UNBIASED", "MixtureNorm", "SwitchableNorm"]

KAPPA = 10.0

UNBIASED = flag("unbiased", True, "unbiased variances of a channel, as the paper's code")


class MixtureNorm(MeasuredNorm):
    """weight · (x - μ) / sqrt(σ² + eps) + bias, where μ = Σ pₖ μₖ and σ² = Σ qₖ σₖ².

    The three μₖ and σₖ² are those of the sample's channel, of the sample and of the batch (in
    eval mode the running statistics); p and q are made of two times three logits. The gradient
    goes through all of it.

    Args:
        num_features: C.
        logits: those that both start with.
        unbiased: take each channel's variance as unbiased, n/(n - 1) times what it is of n
            positions, in all three and in the running variance, as the papers' code does. A
            single position is taken as it is. Default yes.
        **rest: as for `MeasuredNorm`.

    Attributes:
        mean_weight: the logits of p, (3,); var_weight: those of q.
    """

    own: tuple[str, ...] = ("mean_weight", "var_weight")

    def __init__(
        self, num_features: int, logits: list[float], *, unbiased: bool = True, **rest: Any
    ) -> None:
        super().__init__(num_features, **rest)
        self.unbiased = unbiased
        self.first_logits = logits
        self.mean_weight = nn.Parameter(torch.tensor(logits))
        self.var_weight = nn.Parameter(torch.tensor(logits))

    @abstractmethod
    def shares(self, logits: Tensor) -> Tensor:
        """What p and q, the rows of (2, 3), are for logits of that shape."""

    def hold(self, shares: Tensor) -> None:  # most have nothing to hold
        """Hold what the shares of a step of training decide for all steps to come."""

    def within(self, positions: int) -> float:
        """What makes a channel's variance unbiased, if that is asked for."""
        return positions / (positions - 1) if self.unbiased and positions > 1 else 1.0

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Mix the statistics of channel, sample and batch."""
        within = self.within(positions)
        var = var if within == 1.0 else var * within
        of_batch = self.over_batch(mean, var, positions)
        of_sample = pooled(mean, var, 1)
        shares = self.shares(torch.stack([self.mean_weight, self.var_weight]).to(mean.dtype))
        if self.training and not self.observed:
            self.hold(shares.detach())
        p_channel, p_sample, p_batch, q_channel, q_sample, q_batch = shares.flatten().unbind()
        return self.standardized(
            p_channel * mean + (p_sample * of_sample[0] + p_batch * of_batch[0]),
            q_channel * var + (q_sample * of_sample[1] + q_batch * of_batch[1]),
        )

    def pools(self, *, tracks: bool) -> Rule:
        """A mixture, by the shares that it has learned."""
        logits = torch.stack([self.mean_weight, self.var_weight]).detach()
        if logits.is_meta:
            logits = torch.tensor([self.first_logits] * 2)
        p, q = self.shares(logits.cpu().double()).tolist()

        def mixture(batch: Pool) -> Pool:
            pools = (per_group(1), per_group(self.num_features), batch)
            shares = tuple(zip(pools, p, q, strict=True))
            return Pool("mixture", shares=shares, unbiased=self.unbiased)

        return Rule(mixture(BATCH), mixture(RUNNING if tracks else BATCH))


class SwitchableNorm(MixtureNorm):
    """A `MixtureNorm` whose shares are the softmax of the logits.

    Args:
        num_features: C.
        kappa: the batch's logit at the start; the others are zero. 0 mixes evenly, as the paper
            starts; default 10, which leaves 1e-4 to the others.
        **rest: as for `MixtureNorm`.
    """

    def __init__(self, num_features: int, *, kappa: float = KAPPA, **rest: Any) -> None:
        super().__init__(num_features, [0.0, 0.0, float(kappa)], **rest)
        self.kappa = kappa

    def shares(self, logits: Tensor) -> Tensor:
        """The softmax."""
        return logits.softmax(1)


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
            UNBIASED,
            Option("kappa", KAPPA, "the batch's logit at first; 0: even", "0 to 100", _is_logit),
        ),
    ),
)
