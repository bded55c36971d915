"""Switchable normalization: a learned mixture of instance, layer and batch normalization.

Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable Normalization",
ICLR 2019, arXiv 1806.10779.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.batch import BATCH_SOURCES
from normswap.norms.entry import NormEntry, Option, flag
from normswap.norms.measured import (
    OPTIONS,
    MeasuredNorm,
    described,
    furnished,
    pooled,
    settings,
)
from normswap.norms.pool import BATCH, RUNNING, Pool, Rule, per_group
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

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

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Mix the statistics of channel, sample and batch."""
        within = positions / (positions - 1) if self.unbiased and positions > 1 else 1.0
        of_batch = self.over_batch(mean, var, positions, within=within)
        var = var * within
        of_sample = pooled(mean, var, 1)
        p = self.mean_weight.to(mean.dtype).softmax(0)
        q = self.var_weight.to(mean.dtype).softmax(0)
        return self.standardized(
            p[0] * mean + (p[1] * of_sample[0] + p[2] * of_batch[0]),
            q[0] * var + (q[1] * of_sample[1] + q[2] * of_batch[1]),
        )


def _logits(kappa: float) -> Tensor:
    return torch.tensor([0.0, 0.0, kappa])


def _rule(num_features: int, mean_weight: Tensor, var_weight: Tensor) -> Rule:
    p, q = (each.detach().double().softmax(0).tolist() for each in (mean_weight, var_weight))

    def mixture(batch: Pool) -> Pool:
        pools = (per_group(1), per_group(num_features), batch)
        return Pool("mixture", shares=tuple(zip(pools, p, q, strict=True)))

    return Rule(mixture(BATCH), mixture(RUNNING))


def start_switchable_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    sync: bool = False,
    process_group: Any = None,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
    unbiased: bool = True,
    kappa: float = KAPPA,
) -> Start:
    """Start a SwitchableNorm as the BatchNorm that it replaces, but for exp(-kappa) of it."""

    def shell() -> nn.Module:
        module = SwitchableNorm(state.num_features, unbiased=unbiased, kappa=kappa)
        return furnished(
            module.to(state.reference()),
            state,
            sync=sync,
            process_group=process_group,
            eps=eps,
            momentum=momentum,
        )

    return begin(
        state,
        shell,
        _rule(state.num_features, _logits(kappa), _logits(kappa)),
        carry=carry,
        eps=eps,
        affine=affine,
        running=True,
        own=SwitchableNorm.own,
    )


def read_switchable_norm(module: nn.Module) -> NormState:
    """Read a SwitchableNorm, with the shares that it has learned."""
    if not isinstance(module, SwitchableNorm):
        raise TypeError(f"expected a SwitchableNorm, got {type(module).__name__}")
    return NormState(
        norm="sn",
        kind="switchable_norm",
        rule=_rule(module.num_features, *_shares(module)),
        settings={**settings(module), "unbiased": module.unbiased, "kappa": module.kappa},
        **described(module),
    )


def _shares(module: SwitchableNorm) -> tuple[Tensor, Tensor]:
    held = module.mean_weight, module.var_weight
    started = _logits(module.kappa)
    return (started, started) if module.mean_weight.is_meta else held


def _is_logit(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100


ENTRIES = (
    NormEntry(
        name="sn",
        aliases=("switchable_norm", "switchablenorm"),
        kind="switchable_norm",
        axis="statistics",
        pooled="a learned mixture of H·W, C × H·W per sample and N × H·W per channel",
        paper="Luo et al. 2019, arXiv 1806.10779",
        sources=BATCH_SOURCES,
        start=start_switchable_norm,
        reads={SwitchableNorm: read_switchable_norm},
        options=(
            *OPTIONS,
            flag("unbiased", True, "unbiased variances of a channel, as the paper's code"),
            Option("kappa", KAPPA, "the batch's logit at first; 0: even", "0 to 100", _is_logit),
        ),
    ),
)
