"""ScaleNorm: every position's channels are brought to one learned length.

Nguyen and Salazar, "Transformers without Tears: Improving the Normalization of Self-Attention",
IWSLT 2019, arXiv 1910.05895. Nothing is kept, and train mode does what eval mode does.

At its first length of sqrt(C) it is an RMSNorm but for eps, which here is the least length that
is divided by, not an addend under the root. The paper has the one length and nothing else; weight
and bias are there where the norm that is replaced has them, so that nothing is lost that would
have to be folded into other layers. It centres nothing: from a LayerNorm whose inputs have a mean
it is no close start. A map of one channel would keep its signs only, and is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import AffineNorm
from normswap.norms.declared import declared
from normswap.norms.entry import TOKEN_SOURCES, number
from normswap.norms.pool import Over, Pool, Rule
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "ScaleNorm"]

MOST = 1e300


@dataclass(frozen=True)
class _Length(Pool):
    """The channels at a position, by their length.

    Args:
        gain: the length that they get, in sqrt(C).
    """

    over: Over = "position"
    centred: bool = False
    gain: float = 1.0

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """The root mean square, no less than that of a vector of length eps."""
        return var.sqrt().clamp(min=eps / math.sqrt(len(var))) / self.gain


class ScaleNorm(AffineNorm):
    """scale · x / max(|x|, eps), where |x| is the length of the C channels at a position.

    Args:
        num_features: C.
        gain: the length at first, in sqrt(C). Default 1.
        **rest: as for `AffineNorm`; eps is the least length that is divided by.

    Attributes:
        scale: (), the learned length; starts as gain · sqrt(C).
        weight: (C,) or ``None``, beyond the paper, as is bias.

    Raises:
        DegeneratePooling: at a forward with a single channel.
    """

    own = ("scale",)

    eps_option = number("eps", "the least length; None: the source's eps", low=0.0, high=MOST)
    usually_affine = False

    def __init__(self, num_features: int, *, gain: float = 1.0, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.gain = gain
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the first length."""
        nn.init.constant_(self.scale, self.gain * math.sqrt(self.num_features))

    @classmethod
    def chosen(cls, state: NormState, carry: Carry, **given: Any) -> dict[str, Any]:
        """Take the length that another such norm has learned."""
        theirs = state.rule.eval
        gain = theirs.gain if isinstance(theirs, _Length) and carry != "fresh" else 1.0
        return super().chosen(state, carry, gain=gain, **given)

    def pools(self, *, tracks: bool) -> Rule:
        """The channels at a position, with the length that it has learned."""
        if self.scale.is_meta:
            return Rule.always(_Length(gain=self.gain))
        return Rule.always(_Length(gain=float(self.scale.detach()) / math.sqrt(self.num_features)))

    def note(self, state: NormState) -> str:
        """Say how near an RMSNorm is."""
        same = state.rule.eval == Pool("position", centred=False)
        return "equal but for eps" if same else ""

    def standardize(self, x: Tensor) -> Tensor:
        """Bring the channels at each position to the learned length."""
        self.refuse_single_value(x.shape[1], "use more channels")
        length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x * (self.scale.to(x.dtype) / length.clamp(min=self.eps))


ENTRIES = (
    declared(
        ScaleNorm,
        name="scale_norm",
        aliases=("scalenorm",),
        kind="scale_norm",
        axis="standardization",
        pooled="C at a position, by length",
        paper="Nguyen and Salazar 2019, arXiv 1910.05895",
        sources=TOKEN_SOURCES,
    ),
)
