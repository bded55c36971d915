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

import torch
from torch import Tensor, nn

from normswap.norms.affine import AffineNorm, described
from normswap.norms.base import place
from normswap.norms.dynamic import TOKEN_SOURCES
from normswap.norms.entry import AFFINE, NormEntry, number
from normswap.norms.pool import Over, Pool, Rule
from normswap.norms.start import Carry, Start, begin
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
        eps: the least length that is divided by. Default 1e-5.
        dim: as for `AffineNorm`.

    Attributes:
        scale: (), the learned length; starts as sqrt(C).
        weight: (C,) or ``None``, beyond the paper, as is bias.

    Raises:
        DegeneratePooling: at a forward with a single channel.
    """

    own = ("scale",)

    def __init__(self, num_features: int, eps: float = 1e-5, dim: int | None = None) -> None:
        super().__init__(num_features, eps, dim)
        self.scale = nn.Parameter(torch.tensor(math.sqrt(num_features)))

    def standardize(self, x: Tensor) -> Tensor:
        """Bring the channels at each position to the learned length."""
        self.refuse_single_value(x.shape[1], "use more channels")
        length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x * (self.scale.to(x.dtype) / length.clamp(min=self.eps))


def start_scale_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a ScaleNorm; an RMSNorm but for eps, and at the length that another has learned."""
    size, theirs = state.num_features, state.rule.eval
    gain = theirs.gain if isinstance(theirs, _Length) and carry != "fresh" else 1.0

    def shell() -> nn.Module:
        module = ScaleNorm(size, eps=state.eps if eps is None else eps, dim=state.dim)
        module.to(state.reference())
        nn.init.constant_(module.scale, gain * math.sqrt(size))  # in the model's own precision
        return place(module, state)

    if affine is None and not (state.affine or state.tracks):
        affine = False
    return begin(
        state,
        shell,
        Rule.always(_Length(gain=gain)),
        carry=carry,
        eps=eps,
        affine=affine,
        note="equal but for eps" if theirs == Pool("position", centred=False) else "",
        own=ScaleNorm.own,
    )


def read_scale_norm(module: nn.Module) -> NormState:
    """Read a ScaleNorm, with the length that it has learned."""
    if not isinstance(module, ScaleNorm):
        raise TypeError(f"expected a ScaleNorm, got {type(module).__name__}")
    usual = math.sqrt(module.num_features)
    gain = 1.0 if module.scale.is_meta else float(module.scale.detach()) / usual
    return NormState(
        norm="scale_norm",
        kind="scale_norm",
        rule=Rule.always(_Length(gain=gain)),
        settings={"eps": module.eps, "affine": module.weight is not None},
        **described(module),
    )


ENTRIES = (
    NormEntry(
        name="scale_norm",
        aliases=("scalenorm",),
        kind="scale_norm",
        axis="standardization",
        pooled="C at a position, by length",
        paper="Nguyen and Salazar 2019, arXiv 1910.05895",
        sources=TOKEN_SOURCES,
        start=start_scale_norm,
        reads={ScaleNorm: read_scale_norm},
        options=(
            number("eps", "the least length; None: the source's eps", low=0.0, high=MOST),
            AFFINE,
        ),
    ),
)
