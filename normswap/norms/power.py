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
φ moves twice in each step of the warm-up. There is no mask of padding: every position counts. As
backward writes to the slope, a second backward through one forward counts twice, as does the
recomputation of checkpointing; there are no derivatives of second order, and `torch.compile`
breaks its graph there in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normswap.norms.affine import AffineNorm, described, per_channel
from normswap.norms.base import place
from normswap.norms.batch import MOMENTUM
from normswap.norms.dynamic import TOKEN_SOURCES
from normswap.norms.entry import AFFINE, EPS, NormEntry, Option, flag
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState
from normswap.norms.tracked import precise

__all__ = ["ENTRIES", "PowerNorm"]

WARMUP = 10_000
BACKWARD = 0.1


@dataclass(frozen=True)
class _Power(Pool):
    """A channel's mean square over the batch; its running one after the position's in eval.

    Args:
        warmup: for how long the batch is used.
        scaled: whether positions are brought to unit mean square before.
    """

    centred: bool = False
    warmup: int = WARMUP
    scaled: bool = True

    def expected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel's mean square."""
        return torch.zeros_like(mean), var + mean.square()

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """The root mean square of a position, and of what is divided by that."""
        if not self.scaled:
            return super().divisor(var, eps)
        square = var.mean() + eps
        return square.sqrt() * (var / square + eps).sqrt()


class PowerNorm(AffineNorm):
    """weight · u / sqrt(φ + eps) + bias, where u is x by the root mean square of its position.

    Args:
        num_features: C.
        warmup: for how many steps of training φ is that of the batch. Default 10 000.
        group_scale: whether positions are divided by their root mean square. Default yes.
        momentum: weight of the newest batch in the running mean square; ``None`` for the plain
            average. Default 0.1.
        **rest: as for `AffineNorm`; eps is added to both mean squares.

    Attributes:
        running_square: (C,), φ; starts at 1.
        running_slope: (C,), the slope; starts at 0.
        num_batches_tracked: a long scalar, the steps of training.

    Raises:
        DegeneratePooling: at a forward with a single channel that positions are scaled by, and in
            training on a single value for each channel.
    """

    own = ("running_square", "running_slope")
    running_square: Tensor
    running_slope: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        warmup: int = WARMUP,
        group_scale: bool = True,
        momentum: float | None = 0.1,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.warmup = warmup
        self.group_scale = group_scale
        self.momentum = momentum
        self.register_buffer("running_square", torch.ones(num_features))
        self.register_buffer("running_slope", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def standardize(self, x: Tensor) -> Tensor:
        """Divide by the position's and by the channel's root mean square."""
        if self.group_scale:
            self.refuse_single_value(x.shape[1], "use more channels, or group_scale=False")
            x = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        kept = self.running_square.to(x.dtype)
        if not self.training:
            return x * per_channel((kept + self.eps).rsqrt(), x)
        values = x.numel() // self.num_features
        if values == 0:
            return x
        self.refuse_single_value(values, "use a larger batch")
        with torch.no_grad():
            square = x.detach().square().mean([0, *range(2, x.ndim)])
            step = self.num_batches_tracked.add_(1)
            used = torch.where(step <= self.warmup, square, kept)
            self._follow(kept, square, step)
        roots = ((each + self.eps).rsqrt() for each in (used, square))
        y: Tensor = _divided(x, *(per_channel(root, x) for root in roots), self.running_slope)
        return y

    def _follow(self, kept: Tensor, square: Tensor, step: Tensor) -> None:
        """Let φ follow the batch's mean square, at first by the plain average too."""
        share = step.to(square.dtype).reciprocal()
        averaged = torch.where(step < self.warmup, torch.lerp(kept, square, share), kept)
        if self.momentum is None:
            self.running_square.copy_(torch.lerp(kept, square, share))
        else:
            self.running_square.copy_(torch.lerp(averaged, square, self.momentum))

    def extra_repr(self) -> str:
        """Say what it does besides, too."""
        return f"{super().extra_repr()}, warmup={self.warmup}, group_scale={self.group_scale}"


class _Divide(torch.autograd.Function):
    """x · forward, whose gradient is the paper's, by another factor and a running slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor, slope: Tensor) -> Tensor:
        z = x * forward
        ctx.save_for_backward(z, backward)
        ctx.slope = slope
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        z, backward = ctx.saved_tensors
        slope = ctx.slope
        corrected = dy - BACKWARD * per_channel(slope.to(z.dtype), z) * z
        slope.add_((corrected * z).mean([0, *range(2, z.ndim)]).to(slope.dtype))
        return corrected * backward, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _divided(x: Tensor, forward: Tensor, backward: Tensor, slope: Tensor) -> Tensor:
    """`_Divide`, which a compiler would give wrong gradients: it writes to a buffer in backward."""
    y: Tensor = _Divide.apply(x, forward, backward, slope)
    return y


def start_power_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    warmup: int | None = None,
    group_scale: bool = True,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a PowerNorm; without ``group_scale`` it evaluates as running statistics did."""
    steps = WARMUP if warmup is None else warmup
    new_eps = state.eps if eps is None else eps

    def shell() -> nn.Module:
        module = PowerNorm(
            state.num_features,
            warmup=steps,
            group_scale=group_scale,
            momentum=state.momentum if momentum is None else momentum,
            eps=new_eps,
            dim=state.dim,
        )
        return place(module.to(state.reference()), state)

    return begin(
        state,
        shell,
        _rule(steps, group_scale=group_scale),
        carry=carry,
        eps=eps,
        affine=affine,
        kept=partial(_kept, state, steps, new_eps if group_scale else None),
    )


def _rule(warmup: int, *, group_scale: bool) -> Rule:
    train = _Power("batch", warmup=warmup, scaled=group_scale)
    over: Over = "position" if group_scale else "running"
    return Rule(train, _Power(over, scaled=group_scale))


def _kept(state: NormState, warmup: int, eps: float | None) -> dict[str, Tensor]:
    """The mean squares that running statistics tell of, of scaled positions if there is an eps."""
    if state.running_mean is None or state.running_var is None:
        raise ValueError("the source keeps no running statistics")
    square = precise(state.running_var) + precise(state.running_mean).square()
    if eps is not None:
        square = square / (square.mean() + eps)
    steps = torch.tensor(warmup, dtype=torch.long, device=square.device)
    return {
        "running_square": square.to(state.running_mean.dtype),
        "num_batches_tracked": steps,
    }


def read_power_norm(module: nn.Module) -> NormState:
    """Read a PowerNorm: without scaled positions a batch norm in eval mode whose mean is zero."""
    if not isinstance(module, PowerNorm):
        raise TypeError(f"expected a PowerNorm, got {type(module).__name__}")
    told = described(module)
    rule = _rule(module.warmup, group_scale=module.group_scale)
    if not module.group_scale:
        rule = Rule(rule.train, RUNNING)
        told["running_mean"] = torch.zeros_like(module.running_square)
        told["running_var"] = module.running_square.detach()
    return NormState(
        norm="power_norm",
        kind="power_norm",
        rule=rule,
        momentum=module.momentum,
        retold=True,
        settings={
            "warmup": module.warmup,
            "group_scale": module.group_scale,
            "eps": module.eps,
            "momentum": module.momentum,
            "affine": module.weight is not None,
        },
        **told,
    )


def _is_steps(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


ENTRIES = (
    NormEntry(
        name="power_norm",
        aliases=("powernorm",),
        kind="power_norm",
        axis="standardization",
        pooled="C at a position, then the mean square of N × H·W, per channel",
        paper="Shen et al. 2020, arXiv 2003.07845",
        sources=TOKEN_SOURCES,
        start=start_power_norm,
        reads={PowerNorm: read_power_norm},
        options=(
            Option("warmup", None, "steps by the batch; None: 10000", "0 or more", _is_steps),
            flag("group_scale", True, "unit mean square at each position first"),
            EPS,
            MOMENTUM,
            AFFINE,
        ),
    ),
)
