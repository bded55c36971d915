"""Kalman normalization: the batch's statistics, corrected by what the layers before foretell.

Wang, Peng, Luo, Wang and Lin, "Batch Kalman Normalization: Towards Training Deep Neural Networks
with Micro-Batches", 2018, arXiv 1802.03133; "Kalman Normalization: Normalizing Internal
Representations Across Network Layers", NeurIPS 2018.

In training, with a prior mean m and variance v and the batch's mean μ and variance σ², statistics
are p·m + (1 - p)·μ and p·v + (1 - p)·σ² + p·(1 - p)·(μ - m)². Gradients go through all of it, and
so into the layers before. Where the path from one norm through at most an activation and one
convolution or linear to the next is plain, a conversion lets the next foretell its statistics from
the weight and bias of the one before; elsewhere, as behind a residual sum, there is no prior, and
the norm is a batch norm. In eval mode it always is.

The authors' code draws values of the previous norm's input statistics and runs them through the
layer. Here what the layer really gets is taken, values of the previous norm's output, and their
mean and variance in closed form, so that nothing is drawn. The code has neither of the paper's
learned matrices, and this has not. Its parts of a batch with statistics of their own, which stand
in for micro-batches, are left to micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.elementwise import Elementwise
from normswap.norms.entry import Option
from normswap.norms.fidelity import Fidelity
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Over, Pool, Rule
from normswap.norms.remake import why_not
from normswap.norms.start import Start
from normswap.norms.state import NormState
from normswap.norms.statistics.foreseen import (
    foreseen_inputs,
    foreseen_outputs,
    functions_between,
    standardizes_channels,
    why_unforeseen,
)

__all__ = ["ENTRIES", "KalmanNorm"]

PRIOR_WEIGHT = 0.05
#: From which mean ratio of the prior's variance to the batch's on the prior is not believed.
UNLIKELY = 100.0


@dataclass(frozen=True)
class _Corrected(Pool):
    """The batch, and a prior."""

    over: Over = "batch"
    prior_weight: float = PRIOR_WEIGHT


class KalmanNorm(MeasuredNorm):
    """weight · (x - M) / sqrt(V + eps) + bias, with M and V of the batch and of a prior.

    Args:
        num_features: C.
        prior_weight: the prior's weight p, 0 to 1. Default 0.05, the authors' for batches of 128;
            theirs for batches of two is 0.9.
        **rest: as for `MeasuredNorm`.

    Attributes:
        producer: the convolution or linear that feeds it, if a prior is foretold; no child.
        previous: the norm before that; no child.
        between: what stands between the two, in order.
    """

    own = ("producer", "previous", "between", "_judged")
    references = ("producer", "previous")
    producer: Any = None
    previous: Any = None
    between: tuple[Elementwise, ...] = ()

    def __init__(
        self, num_features: int, *, prior_weight: float = PRIOR_WEIGHT, **rest: Any
    ) -> None:
        super().__init__(num_features, **rest)
        self.prior_weight = prior_weight
        self._given: tuple[Tensor, Tensor] | None = None
        self._judged: tuple[Any, bool] = (None, False)

    def forward(self, input: Tensor, prior: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalize the input.

        Args:
            input: of any shape with ``num_features`` channels at ``channel_dim``.
            prior: mean and variance (C,) to be used in training, in place of what is foretold.
        """
        if prior is None:
            return super().forward(input)
        self._given = prior
        try:
            return super().forward(input)
        finally:
            self._given = None

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Correct the batch's statistics by the prior."""
        prior = self._prior(mean) if self.training and not self.plain_statistics else None
        if prior is None:
            return self.standardized(*self.over_batch(mean, var, positions))
        centre, spread, total = self.of_batch(mean, var, positions)
        if total == 0:
            return self.standardized(centre, spread)
        foretold, expected = prior
        weight = ((expected / spread).mean() < UNLIKELY).to(mean.dtype) * self.prior_weight
        away = weight * (1 - weight) * (centre - foretold).square()
        spread = weight * expected + (1 - weight) * spread + away
        centre = weight * foretold + (1 - weight) * centre
        self._track(centre, spread)
        return self.standardized(centre, spread)

    def _prior(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance that are given or foretold, (C,) each, or ``None``."""
        if self._given is not None:
            mean, var = self._given
            return mean.to(like), var.to(like)
        if self.producer is None or not self._foretells():
            return None
        inputs = foreseen_inputs(self.previous, list(self.between), like)
        return foreseen_outputs(self.producer, *inputs)

    def _foretells(self) -> bool:
        """Whether weight and bias of the norm before tell anything; another may stand there now."""
        if self._judged[0] is not self.previous:
            self._judged = self.previous, standardizes_channels(self.previous)
        return self._judged[1]

    def pools(self, *, tracks: bool) -> Rule:
        """The batch, with the prior if there is one."""
        batch = BATCH if self.producer is None else _Corrected(prior_weight=self.prior_weight)
        return Rule(batch, RUNNING if tracks else BATCH)

    def started(self, state: NormState, start: Start) -> Start:
        """Say whether there is a prior; with one, training is another function."""
        problem = _why_no_prior(state)
        if problem:
            return start.noted(f"without a prior: {problem}") if state.kind else start
        fidelity = Fidelity.EVAL if start.fidelity is Fidelity.EXACT else start.fidelity
        return replace(start, fidelity=fidelity).noted(
            f"its prior is through {state.producer.path}"
        )

    def settle(self, state: NormState) -> None:
        """Refer to what foretells the prior."""
        if not _why_no_prior(state):
            self.refer_to(producer=state.producer.module, previous=state.previous.norm)
            self.between = tuple(functions_between(state.previous))


def _why_no_prior(state: NormState) -> str:
    """Why nothing foretells the statistics; empty if something does."""
    # That another layer reads the producer's output too, or that a hook looks on, is no matter.
    layer = replace(state.producer, problem="")
    return why_unforeseen(state.previous, layer.module) or why_not(layer)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


ENTRIES = (
    declared(
        KalmanNorm,
        name="kalman",
        aliases=("kalman_norm", "batch_kalman_norm", "bkn"),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W, per channel, and what the layers before foretell",
        paper="Wang et al. 2018, arXiv 1802.03133",
        options=(Option("prior_weight", PRIOR_WEIGHT, "of what is foretold", "0 to 1", _is_share),),
        needs=("previous",),
    ),
)
