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
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.affine import AffineNorm, described
from normswap.norms.base import place
from normswap.norms.entry import AFFINE, NormEntry, Option
from normswap.norms.pool import Curve, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "TOKEN_SOURCES", "DynamicErf", "DynamicTanh"]

#: Families of what stands in transformers: what norms of tokens convert when not told otherwise.
TOKEN_SOURCES = frozenset({"layer_norm", "rms_norm"})

ALPHA = 0.5
KAPPA = 0.5


class DynamicTanh(AffineNorm):
    """weight · tanh(alpha · x) + bias, of one learned alpha for the layer.

    Args:
        num_features: C.
        alpha: what the learned one starts as. Default 0.5, as in the paper, whose language models
            take more in front of attention and less elsewhere.
        **rest: as for `AffineNorm`; eps is only kept for a conversion to a norm that has one.

    Attributes:
        alpha: (1,), as in the paper's code.
        asked: the options by which a conversion made it.
    """

    own: tuple[str, ...] = ("alpha",)
    asked: Mapping[str, object] = MappingProxyType({})

    def __init__(self, num_features: int, *, alpha: float = ALPHA, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))

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


def start_dynamic(
    state: NormState,
    *,
    made_of: type[DynamicTanh],
    carry: Carry = "auto",
    alpha: float | None = None,
    kappa: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start one of the two, from running statistics with its slope at zero matched."""
    first = alpha
    if first is None:
        first = ALPHA if carry == "fresh" else _alpha(made_of, state, kappa or KAPPA)

    def shell() -> nn.Module:
        module = made_of(state.num_features, alpha=first, eps=state.eps, dim=state.dim)
        module.asked = {"alpha": alpha, "kappa": kappa}
        module.to(state.reference())
        nn.init.constant_(module.alpha, first)  # in the model's own precision
        return place(module, state)

    rule = Rule.always(made_of.curve(first))
    return begin(state, shell, rule, carry=carry, affine=affine, own=made_of.own)


def _alpha(made_of: type[DynamicTanh], state: NormState, kappa: float) -> float:
    """kappa over the root mean square of what is expected, or the slope of another such norm."""
    theirs = state.rule.eval
    if isinstance(theirs, Curve) and theirs.slope > 0:
        return theirs.slope * theirs.rise / made_of.curve(ALPHA).rise
    if state.running_mean is None or state.running_var is None or state.running_mean.is_meta:
        return ALPHA
    mean, var = state.running_mean.detach().cpu(), state.running_var.detach().cpu()
    square = float((var.double() + mean.double().square()).mean())
    return kappa / math.sqrt(square) if 0 < square < math.inf else ALPHA


def read_dynamic(module: nn.Module, *, norm: str) -> NormState:
    """Read one of the two, with what it has learned."""
    if not isinstance(module, DynamicTanh):
        raise TypeError(f"expected a DynamicTanh or a DynamicErf, got {type(module).__name__}")
    known = not module.alpha.is_meta
    learned = [float(module.get_parameter(name).detach()) for name in module.own if known]
    return NormState(
        norm=norm,
        kind=norm,
        rule=Rule.always(module.curve(*(learned or [ALPHA]))),
        settings={**module.asked, "affine": module.weight is not None},
        **described(module),
    )


def _is_positive(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and 0 < value < math.inf


def _entry(
    made_of: type[DynamicTanh], name: str, aliases: tuple[str, ...], function: str, paper: str
) -> NormEntry:
    start: Callable[..., Start] = partial(start_dynamic, made_of=made_of)
    return NormEntry(
        name=name,
        aliases=aliases,
        kind=name,
        axis="standardization",
        pooled=f"nothing: a learned {function} of every value",
        paper=paper,
        sources=TOKEN_SOURCES,
        start=start,
        reads={made_of: partial(read_dynamic, norm=name)},
        options=(
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
            AFFINE,
        ),
    )


ENTRIES = (
    _entry(
        DynamicTanh,
        "dyt",
        ("dynamic_tanh", "dynamictanh"),
        "tanh",
        "Zhu et al. 2025, arXiv 2503.10622",
    ),
    _entry(
        DynamicErf,
        "derf",
        ("dynamic_erf", "dynamicerf"),
        "erf",
        "Chen et al. 2025, arXiv 2512.10938",
    ),
)
