"""Moving average batch normalization: batches too small for statistics borrow from those before.

Yan, Wan, Zhang, Zhang, Wei and Sun, "Towards Stabilizing Batch Statistics in Backward Propagation
of Batch Normalization", ICLR 2020, arXiv 2001.06838.

There is no mean. A channel is divided by the root of the mean of its last ``buffer_size`` mean
squares, and in backward the mean of as many products dz · z takes the place of the batch's. A
factor without a gradient brings the output to the scale that what is kept for eval mode would
give it: within 1/5 to 5, and only from the step on that follows the first 1000. For the first
``warmup`` steps, and until all slots are filled, statistics are those of the batch alone: that is
the exact gradient of what is computed.

This follows the released code, where weights of convolutions are centralised beside it, so that
what arrives has a mean near zero. That is a step of its own, which changes what a network
computes, and is not done here: inputs far from zero train badly, and the plan tells how far they
are. The code's momentum is 0.02; a conversion keeps the source's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.affine_norm import per_channel
from normswap.norms.declared import declared
from normswap.norms.entry import whole
from normswap.norms.mean_square import MeanSquare, MeanSquareNorm, settled
from normswap.norms.pool import Rule
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "MovingAverageBatchNorm"]

BUFFER_SIZE = 16
WARMUP = 100
#: From which step on the output is brought to the scale of eval mode, and by what at most.
RESCALED = 1000
MOST = 5.0
#: As many standard deviations from zero a mean that stays matters.
FAR = 1.0


@dataclass(frozen=True)
class _Recent(MeanSquare):
    """The mean squares of the last batches.

    Args:
        buffer_size: of how many.
        warmup: for how long the batch is taken alone.
    """

    buffer_size: int = BUFFER_SIZE
    warmup: int = WARMUP


class MovingAverageBatchNorm(MeanSquareNorm):
    """weight · r · x / sqrt(χ + eps) + bias, where χ is the mean of the last batches' mean squares.

    Args:
        num_features: C.
        buffer_size: how many batches statistics are means of. Default 16, the paper's for batches
            of two that stand for one of 32.
        warmup: from which step on they are, once there are as many. Default 100.
        **rest: as for `MeanSquareNorm`.

    Attributes:
        running_square: (C,), the mean square that eval mode divides by.
        recent_squares: (buffer_size, C), those of the last batches, in slots.
        recent_products: (buffer_size, C), the means of dz · z, written in backward.
        steps: a long scalar, the steps of training since it was made; num_batches_tracked goes on
            from the source's.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_square", "recent_squares", "recent_products", "steps")
    recent_squares: Tensor
    recent_products: Tensor
    steps: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        buffer_size: int = BUFFER_SIZE,
        warmup: int = WARMUP,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.buffer_size = buffer_size
        self.warmup = warmup
        self.register_buffer("recent_squares", torch.zeros(buffer_size, num_features))
        self.register_buffer("recent_products", torch.zeros(buffer_size, num_features))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long))

    def standardize(self, x: Tensor) -> Tensor:
        """Divide by what the last batches were, or by what was kept of all."""
        if not self.training:
            return self.by_kept(x)
        if not (x.numel() or self.pools_ranks):
            return x
        square = self.square(x)
        with torch.no_grad():
            step = self.steps.add_(1)
            alone = (step <= self.buffer_size) | (step < self.warmup)
            slot = (step % self.buffer_size).view(1)
            used = self._recent(self.recent_squares, square, alone, slot)
            root = (used + self.eps).rsqrt()
            factor = (self.running_square.to(x.dtype) + self.eps).rsqrt() / root
            late = step > max(RESCALED, self.warmup)
            factor = torch.where(late, factor.clamp(1 / MOST, MOST), torch.ones_like(factor))
            factor = settled(factor)
            self.track(running_square=used)
        z = self.divided(x, root, root, self._slope, alone, slot)
        return z * per_channel(factor, z)

    def _slope(self, product: Tensor, alone: Tensor, slot: Tensor) -> Tensor:
        """The mean of the last products, of which this one is the newest."""
        return self._recent(self.recent_products, product, alone, slot)

    @staticmethod
    def _recent(kept: Tensor, new: Tensor, alone: Tensor, slot: Tensor) -> Tensor:
        """The mean of the slots after this batch's is written, or this batch's alone."""
        kept.index_copy_(0, slot, new.to(kept.dtype)[None])
        return torch.where(alone, new, kept.to(new.dtype).mean(0))

    def pools(self, *, tracks: bool) -> Rule:
        """The last batches' mean squares; in eval mode the running one."""
        train = _Recent("batch", buffer_size=self.buffer_size, warmup=self.warmup)
        return Rule(train, MeanSquare("running"))

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The mean square that running statistics tell of."""
        return {"running_square": var + mean.square()}

    def note(self, state: NormState) -> str:
        """Say how far from zero its inputs are, where that matters."""
        mean, var = state.running_mean, state.running_var
        if mean is None or var is None or mean.is_meta:
            return ""
        away = float((mean.detach().abs() / (var.detach() + state.eps).sqrt()).max())
        if away <= FAR:
            return ""
        return f"no mean is removed: channels are up to {away:.1f} standard deviations from zero"

    def extra_repr(self) -> str:
        """Say how many batches it takes, too."""
        return f"{super().extra_repr()}, buffer_size={self.buffer_size}, warmup={self.warmup}"


ENTRIES = (
    declared(
        MovingAverageBatchNorm,
        name="mabn",
        aliases=("moving_average_bn", "moving_average_norm"),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W of the last batches, per channel, by the mean square",
        paper="Yan et al. 2020, arXiv 2001.06838",
        options=(
            whole("buffer_size", None, "of how many batches; None: 16"),
            whole("warmup", None, "steps by the batch alone; None: 100", low=0),
        ),
    ),
)
