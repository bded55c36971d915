"""Filter response normalization, and the thresholded linear unit that follows it.

Singh and Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the
Training of Deep Neural Networks", CVPR 2020, arXiv 1911.09737.

Every channel of a sample is divided by its root mean square over the positions; no mean is
subtracted, and nothing is kept. As zero is then not where a ReLU cuts best, the paper replaces the
ReLU behind it by max(y, tau) with a learned tau per channel. At tau = 0 that is the ReLU itself:
where one ReLU alone follows the norm, a conversion puts such a unit in its place, be the ReLU a
module, one module that serves many norms, or a call in a forward. Any other activation stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.beside import Replaced
from normswap.norms.declared import declared
from normswap.norms.elementwise import is_relu
from normswap.norms.entry import Option, flag
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import Pool, Rule
from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "TLU", "FilterResponseNorm", "Response"]

EXTRA_EPS = 1e-4


class TLU(nn.Module):
    """The thresholded linear unit max(x, tau), with a threshold per channel.

    Args:
        num_features: C.
        affine: add a learned slope: max(x, alpha · x + tau), as in TensorFlow Addons. Default no.
        channel_dim: where the channels are in the input. Default 1.

    Attributes:
        tau: (C,), starts at 0, where the unit is a ReLU.
        alpha: (C,) or ``None``, starts at 0.

    Source: Singh and Krishnan, 2020, arXiv 1911.09737.
    """

    def __init__(self, num_features: int, *, affine: bool = False, channel_dim: int = 1) -> None:
        super().__init__()
        self.num_features = num_features
        self.channel_dim = channel_dim
        self.tau = nn.Parameter(torch.zeros(num_features))
        self.alpha = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, input: Tensor) -> Tensor:
        """Threshold an input with C channels at ``channel_dim``, of any shape otherwise."""
        behind = input.ndim - 1 - self.channel_dim % input.ndim
        shape = (-1, *[1] * behind)
        least = self.tau.to(input.dtype).view(shape)
        if self.alpha is not None:
            least = self.alpha.to(input.dtype).view(shape) * input + least
        return torch.maximum(input, least)

    def extra_repr(self) -> str:
        """Say size and form."""
        return f"{self.num_features}, affine={self.alpha is not None}"


@dataclass(frozen=True)
class Response(Pool):
    """A sample's channel by its mean square.

    Args:
        extra: what is learned beside eps, so that a single value is not just divided by itself.
    """

    extra: float | None = None

    def values(self, batch: int, num_features: int, length: int) -> int:
        """How many values it is pooled over; enough, where eps is learned."""
        return length if self.extra is None else max(length, 2)


class FilterResponseNorm(MeasuredNorm):
    """weight · x / sqrt(mean(x²) + eps) + bias, with the mean over one sample's channel.

    Args:
        num_features: C.
        activation: what a conversion does with the ReLU that follows: ``"tlu"`` replaces it by a
            `TLU`, ``"keep"`` leaves it. ``None``, the default, is ``"tlu"``; but a norm that is
            built by itself ends in a `TLU` only with ``"tlu"``.
        learned_eps: add the absolute value of one learned number to eps, as the paper does where
            a channel is a single value. Default no.
        **rest: as for `MeasuredNorm`; the paper's eps is 1e-6.

    Attributes:
        extra_eps: (1,) or ``None``, starts at 1e-4.

    Raises:
        DegeneratePooling: at a forward on a single position without ``learned_eps``, where only
            signs would be left.
    """

    own = ("extra_eps",)
    extra_eps: nn.Parameter | None
    tracks = False
    synchronizes = False

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | None = None,
        learned_eps: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.activation = activation
        self.learned_eps = learned_eps
        extra = nn.Parameter(torch.full((1,), EXTRA_EPS)) if learned_eps else None
        self.register_parameter("extra_eps", extra)

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Divide by the root mean square."""
        eps: float | Tensor = self.eps
        if self.extra_eps is None:
            self.refuse_single_value(positions, "use larger maps, or learned_eps=True")
        else:
            eps = self.eps + self.extra_eps.to(mean.dtype).abs()
        gain = (var + mean.square() + eps).rsqrt()
        return self.with_affine(gain, torch.zeros_like(gain))

    def pools(self, *, tracks: bool) -> Rule:
        """A sample's channel."""
        extra: Tensor | None = self.extra_eps
        if extra is not None and extra.is_meta:
            extra = torch.full((1,), EXTRA_EPS, device="cpu")
        learned = None if extra is None else abs(float(extra))
        return Rule.always(Response("group", centred=False, extra=learned))

    def started(self, state: NormState, start: Start) -> Start:
        """Put a `TLU` in the place of the ReLU that alone follows."""
        if self.activation == "keep" or not state.kind:
            return start
        follows = state.activation
        if follows.problem or not is_relu(follows.function):
            why = follows.problem or f"{follows.path} is no ReLU"
            return start.noted(f"without TLU: {why}")
        start = start.noted(f"{follows.path} becomes a TLU")
        if follows.fused:
            return start
        return replace(start, beside=(*start.beside, Replaced(follows, partial(_unit, state))))

    def settle(self, state: NormState) -> None:
        """Put a `TLU` in the place of a fused ReLU; and behind a built norm that asks for it."""
        follows = state.activation
        if self.activation != "keep" and follows.fused and is_relu(follows.function):
            self.add_module(follows.fused, _unit(state))
        elif self.activation == "tlu" and not state.kind:
            self.add_module("act", _unit(state))
            self.tail = (*self.tail, "act")


def _unit(state: NormState) -> TLU:
    return TLU(state.num_features, channel_dim=state.channel_dim).to(state.reference())


ENTRIES = (
    declared(
        FilterResponseNorm,
        name="frn",
        aliases=("filter_response_norm", "filterresponsenorm"),
        kind="filter_response_norm",
        axis="standardization",
        pooled="the mean square of H·W, per sample and channel",
        paper="Singh and Krishnan 2020, arXiv 1911.09737",
        options=(
            Option(
                "activation",
                None,
                'the ReLU behind it: "tlu" replaces it, "keep" leaves it; None: "tlu"',
                '"tlu" or "keep"',
                lambda value: value in ("tlu", "keep"),
            ),
            flag("learned_eps", False, "a learned number beside eps, for single positions"),
        ),
        needs=("activation",),
    ),
)
