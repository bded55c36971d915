"""Dynamic tanh and dynamic erf: a learned squashing function takes the place of statistics.

Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization", CVPR 2025, arXiv 2503.10622,
and Chen, Lu, Zhu, Sun and Liu, "Stronger Normalization-Free Transformers", 2025, arXiv
2512.10938. Nothing is measured, in train mode as in eval, so that nothing is kept and samples
never meet.

From running statistics the start is the function's slope at zero, alpha = kappa / rms of the
channels, which the gain undoes: with kappa towards zero it comes as near to the source as one
likes, and squashes nothing. From a norm that keeps none there is only the papers' alpha of 0.5,
and weight and bias as they were; `normswap.calibrate` fits them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import AffineNorm
from normswap.norms.declared import declared
from normswap.norms.entry import TOKEN_SOURCES, Option
from normswap.norms.pool import Curve, Rule
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "DynamicErf", "DynamicTanh"]

ALPHA = 0.5
KAPPA = 0.5


class DynamicTanh(AffineNorm):
    """weight · tanh(alpha · x) + bias, of one learned alpha for the layer.

    Args:
        num_features: C.
        alpha: what the learned one starts as. Default 0.5, as in the paper, whose language models
            take more in front of attention and less elsewhere.
        asked: the options by which a conversion chose it. Default none.
        **rest: as for `AffineNorm`; eps is only kept for a conversion to a norm that has one.

    Attributes:
        alpha: (1,), as in the paper's code.
        first: what alpha started as.
    """

    own: tuple[str, ...] = ("alpha",)
    eps_option = None

    def __init__(
        self,
        num_features: int,
        *,
        alpha: float = ALPHA,
        asked: Mapping[str, object] = MappingProxyType({}),
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.first = alpha
        self.asked = dict(asked)
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the first slope."""
        nn.init.constant_(self.alpha, self.first)

    @classmethod
    def chosen(
        cls,
        state: NormState,
        carry: Carry,
        *,
        alpha: float | None = None,
        kappa: float | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Choose a slope by the source's statistics."""
        asked = {"alpha": alpha, "kappa": kappa}
        if alpha is None:
            alpha = ALPHA if carry == "fresh" else cls._matching(state, kappa or KAPPA)
        return super().chosen(state, carry, alpha=alpha, asked=asked, **given)

    @classmethod
    def _matching(cls, state: NormState, kappa: float) -> float:
        """kappa over the root mean square of what is expected, or another such norm's slope."""
        theirs = state.rule.eval
        if isinstance(theirs, Curve) and theirs.slope > 0:
            return theirs.slope * theirs.rise / cls.curve(ALPHA).rise
        if state.running_mean is None or state.running_var is None or state.running_mean.is_meta:
            return ALPHA
        mean, var = state.running_mean.detach().cpu(), state.running_var.detach().cpu()
        square = float((var.double() + mean.double().square()).mean())
        return kappa / math.sqrt(square) if 0 < square < math.inf else ALPHA

    def pools(self, *, tracks: bool) -> Rule:
        """The function, with what it has learned."""
        if self.alpha.is_meta:
            return Rule.always(self.curve(self.first))
        learned = (float(self.get_parameter(name).detach()) for name in self.own)
        return Rule.always(self.curve(*learned))

    def settings(self, names: Iterable[str]) -> dict[str, object]:
        """What a conversion was asked for: the slope has moved on since."""
        return dict(self.asked)

    def standardize(self, x: Tensor) -> Tensor:
        """Squash every value by itself."""
        return (self.alpha.to(x.dtype) * x).tanh()

    @classmethod
    def curve(cls, alpha: float, shift: float = 0.0) -> Curve:
        """The function, of a slope and a shift."""
        return Curve(curve="tanh", slope=alpha, shift=shift)


class DynamicErf(DynamicTanh):
    """weight · erf(alpha · x + shift) + bias, of one learned alpha and shift for the layer.

    Args:
        num_features: C.
        **rest: as for `DynamicTanh`.

    Attributes:
        shift: (1,), inside of the function; starts at zero.
    """

    own = ("alpha", "shift")

    def __init__(self, num_features: int, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.shift = nn.Parameter(torch.zeros(1))

    def standardize(self, x: Tensor) -> Tensor:
        """Squash every value by itself."""
        return (self.alpha.to(x.dtype) * x + self.shift.to(x.dtype)).erf()

    @classmethod
    def curve(cls, alpha: float, shift: float = 0.0) -> Curve:
        """The function, of a slope and a shift."""
        return Curve(curve="erf", slope=alpha, shift=shift, rise=2 / math.sqrt(math.pi))


def _is_positive(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and 0 < value < math.inf


OPTIONS = (
    Option(
        "alpha",
        None,
        "the first slope; None: kappa by the source's statistics, 0.5 without any",
        "a number above 0",
        _is_positive,
    ),
    Option(
        "kappa",
        None,
        "how far into the function an ordinary value reaches at first; None: 0.5",
        "a number above 0",
        _is_positive,
    ),
)

ENTRIES = (
    declared(
        DynamicTanh,
        name="dyt",
        aliases=("dynamic_tanh", "dynamictanh"),
        kind="dyt",
        axis="standardization",
        pooled="nothing: a learned tanh of every value",
        paper="Zhu et al. 2025, arXiv 2503.10622",
        options=OPTIONS,
        sources=TOKEN_SOURCES,
    ),
    declared(
        DynamicErf,
        name="derf",
        aliases=("dynamic_erf", "dynamicerf"),
        kind="derf",
        axis="standardization",
        pooled="nothing: a learned erf of every value",
        paper="Chen et al. 2025, arXiv 2512.10938",
        options=OPTIONS,
        sources=TOKEN_SOURCES,
    ),
)
