"""Power normalization: by a running mean square in forward, and an estimate of it in backward.

Shen, Yao, Gholami, Mahoney and Keutzer, "PowerNorm: Rethinking Batch Normalization in
Transformers", ICML 2020, arXiv 2003.07845.

First the channels at each position are brought to unit mean square (``group_scale``), then each
channel is divided by the root of its mean square φ: the batch's for the first ``warmup`` steps,
from then on that kept of the steps before. The gradient is not that of this function. A running
slope, which backward learns as it goes, stands for what φ would do in it, and it divides by the
batch's mean square, whatever the forward divided by.

This follows the released code, which the paper's numbers come from, where it differs from the
paper: the update of the slope has no factor, the backward divides by the batch's mean square, and
φ moves twice in each step of the warm-up. There is no mask of padding: every position counts.
What a backward that keeps something asks of a training loop, says
`normswap.norms.mean_square`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import TOKEN_SOURCES, flag, whole
from normswap.norms.mean_square import MeanSquare, MeanSquareNorm
from normswap.norms.pool import Over, Rule

__all__ = ["ENTRIES", "PowerNorm"]

WARMUP = 10_000
BACKWARD = 0.1


@dataclass(frozen=True)
class _Power(MeanSquare):
    """A channel's mean square over the batch; its running one after the position's in eval.

    Args:
        warmup: for how long the batch is used.
        scaled: whether positions are brought to unit mean square before.
    """

    warmup: int = WARMUP
    scaled: bool = True

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """The root mean square of a position, and of what is divided by that."""
        if not self.scaled:
            return super().divisor(var, eps)
        square = var.mean() + eps
        return square.sqrt() * (var / square + eps).sqrt()


class PowerNorm(MeanSquareNorm):
    """weight · u / sqrt(φ + eps) + bias, where u is x by the root mean square of its position.

    Args:
        num_features: C.
        warmup: for how many steps of training φ is that of the batch. Default 10 000.
        group_scale: whether positions are divided by their root mean square. Default yes.
        **rest: as for `MeanSquareNorm`; eps is added to both mean squares.

    Attributes:
        running_slope: (C,), the slope; starts at 0.
        num_batches_tracked: a long scalar, the steps of training.

    Raises:
        DegeneratePooling: at a forward with a single channel that positions are scaled by, and in
            training on a single value for each channel.
    """

    own = ("running_square", "running_slope")
    running_slope: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        warmup: int = WARMUP,
        group_scale: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.warmup = warmup
        self.group_scale = group_scale
        self.register_buffer("running_slope", torch.zeros(num_features))

    def standardize(self, x: Tensor) -> Tensor:
        """Divide by the position's and by the channel's root mean square."""
        if self.group_scale:
            self.refuse_single_value(x.shape[1], "use more channels, or group_scale=False")
            x = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        if not self.training:
            return self.by_kept(x)
        if not (x.numel() or self.pools_ranks):
            return x
        square, kept = self.square(x), self.running_square.to(x.dtype)
        with torch.no_grad():
            step = self.num_batches_tracked.add_(1)
            forward = (torch.where(step <= self.warmup, square, kept) + self.eps).rsqrt()
            backward = (square + self.eps).rsqrt()
            self._follow(kept, square, step)
        return self.divided(x, forward, backward, self._slope, square * forward.square())

    def _follow(self, kept: Tensor, square: Tensor, step: Tensor) -> None:
        """Let φ follow the batch's mean square, at first by the plain average too."""
        share = step.to(square.dtype).reciprocal()
        averaged = torch.where(step < self.warmup, torch.lerp(kept, square, share), kept)
        if self.momentum is None:
            self.running_square.copy_(torch.lerp(kept, square, share))
        else:
            self.running_square.copy_(torch.lerp(averaged, square, self.momentum))

    def _slope(self, product: Tensor, energy: Tensor) -> Tensor:
        """A share of the running slope, which then moves by what is left of the batch's.

        Args:
            product: the mean of dz · z over the batch, (C,).
            energy: the mean of z².
        """
        slope = BACKWARD * self.running_slope.to(product.dtype)
        self.running_slope.add_((product - slope * energy).to(self.running_slope.dtype))
        return slope

    def pools(self, *, tracks: bool) -> Rule:
        """The batch's mean square; in eval mode the running one, after the position's."""
        train = _Power("batch", warmup=self.warmup, scaled=self.group_scale)
        over: Over = "position" if self.group_scale else "running"
        return Rule(train, _Power(over, scaled=self.group_scale))

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The mean squares that running statistics tell of, and a warm-up that is over."""
        square = var + mean.square()
        if self.group_scale:
            square = square / (square.mean() + self.eps)
        steps = torch.tensor(self.warmup, dtype=torch.long, device=square.device)
        return {"running_square": square, "num_batches_tracked": steps}

    def retold(self) -> dict[str, Any]:
        """Without scaled positions, as of any such norm; with them no batch norm is like it."""
        return {} if self.group_scale else super().retold()

    def extra_repr(self) -> str:
        """Say what it does besides, too."""
        return f"{super().extra_repr()}, warmup={self.warmup}, group_scale={self.group_scale}"


ENTRIES = (
    declared(
        PowerNorm,
        name="power_norm",
        aliases=("powernorm",),
        kind="power_norm",
        axis="standardization",
        pooled="C at a position, then the mean square of N × H·W, per channel",
        paper="Shen et al. 2020, arXiv 2003.07845",
        options=(
            whole("warmup", None, "steps by the batch; None: 10000", low=0),
            flag("group_scale", True, "unit mean square at each position first"),
        ),
        sources=TOKEN_SOURCES,
    ),
)
