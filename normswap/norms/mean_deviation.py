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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine import per_channel
from normswap.norms.batch import BATCH_SOURCES
from normswap.norms.entry import NormEntry
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState
from normswap.norms.tracked import OPTIONS, TrackedNorm, furnished, of_source, precise, retold

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
        running_scale: (C,), what sqrt(π/2) · mean |x - μ| was in training.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_scale",)
    running_scale: Tensor

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
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


def _rule(eps: float) -> Rule:
    return Rule(_Deviation(eps=eps), RUNNING)


def start_l1_batch_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    sync: bool = False,
    process_group: Any = None,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start an L1BatchNorm, which evaluates as what evaluated by running statistics did."""
    new_eps = state.eps if eps is None else eps

    def shell() -> nn.Module:
        return furnished(
            L1BatchNorm(state.num_features),
            state,
            sync=sync,
            process_group=process_group,
            eps=new_eps,
            momentum=momentum,
        )

    return begin(
        state,
        shell,
        _rule(new_eps),
        carry=carry,
        affine=affine,
        kept=partial(_kept, state, new_eps),
    )


def _kept(state: NormState, eps: float) -> dict[str, Tensor]:
    """The scale that divides as a variance did: sqrt(var + eps of the source) - eps."""
    var, taken = of_source(state)
    scale = ((var + state.eps).sqrt() - eps).clamp(min=0)
    return {**taken, "running_scale": scale.to(taken["running_mean"].dtype)}


def read_l1_batch_norm(module: nn.Module) -> NormState:
    """Read an L1BatchNorm, with the variance that would divide as its scale does."""
    if not isinstance(module, L1BatchNorm):
        raise TypeError(f"expected an L1BatchNorm, got {type(module).__name__}")
    scale = precise(module.running_scale) + module.eps
    return NormState(
        norm="l1_bn",
        kind="batch_norm",
        rule=_rule(module.eps),
        settings={
            "sync": module.sync,
            "process_group": module.process_group,
            "eps": module.eps,
            "momentum": module.momentum,
            "affine": module.weight is not None,
        },
        **retold(module, scale.square() - module.eps),
    )


ENTRIES = (
    NormEntry(
        name="l1_bn",
        aliases=("l1_batch_norm", "l1batchnorm"),
        kind="batch_norm",
        axis="standardization",
        pooled="N × H·W, per channel, by the mean absolute deviation",
        paper="Wu et al. 2018, arXiv 1802.09769",
        sources=BATCH_SOURCES,
        start=start_l1_batch_norm,
        reads={L1BatchNorm: read_l1_batch_norm},
        options=OPTIONS,
    ),
)
