"""EvoNorm: a normalization and an activation in one, found by evolution.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv
2004.02967, the forms B0 and S0. Nothing is centred. A conversion puts one in the place of a norm
and of the activation that alone follows it; where none does, the paper's form is gain and offset
alone, and evaluates as what it replaces.

What norm and activation computed is not among the functions that an EvoNorm can compute. From
running statistics it starts at the gain, offset and slope that come nearest to it in the mean
square, for values that are Gaussian in each channel; the rest is for training. What takes its
place later gets the activation back, behind it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.norms.affine_norm import AffineNorm, per_channel
from normswap.norms.beside import Replaced
from normswap.norms.elementwise import as_module, is_elementwise, nodes
from normswap.norms.pool import Curve, Rule
from normswap.norms.precision import precise
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState

__all__ = ["EvoNorm"]

#: The slopes that are tried for a start, of either sign, in units of `EvoNorm.slope_unit`.
SLOPES = (0.0, *(2.0**power for power in range(-3, 7)))


@dataclass(frozen=True)
class _Evolved(Curve):
    """A norm and an activation in one.

    Args:
        learned: whether the slopes are others than those that it starts with.
    """

    learned: bool = False


class EvoNorm(AffineNorm):
    """weight · z + bias, where z is normalized and activated by a learned slope ``v``.

    Args:
        num_features: C.
        nonlinearity: whether it is an activation too; without, z is the input, as in the paper.
            Default yes; a conversion decides by whether an activation alone follows.
        **rest: as for `AffineNorm`.

    Attributes:
        v: (C,), the slope; starts at 1.
        replaced_act: the activation that it stands for, for a norm in its place; never called.
        nearest_act: its class, where the norm stands for none that was there.
    """

    nearest_act: ClassVar[type[nn.Module]] = nn.ReLU

    own = ("v",)
    v: nn.Parameter | None
    replaced_act: nn.Module | None

    def __init__(self, num_features: int, *, nonlinearity: bool = True, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.nonlinearity = nonlinearity
        self.v = nn.Parameter(torch.ones(num_features)) if nonlinearity else None
        self.replaced_act = self.nearest_act() if nonlinearity else None
        self.stands_for = "replaced_act" if nonlinearity else ""

    @property
    def channels_per_group(self) -> int:
        """How many channels of a sample share a deviation."""
        return 1

    def standardize(self, x: Tensor) -> Tensor:
        """What gain and offset are applied to."""
        return x if self.v is None else self.evolved(x, per_channel(self.v.to(x.dtype), x))

    @abstractmethod
    def evolved(self, x: Tensor, v: Tensor) -> Tensor:
        """Normalize and activate an input, with the slope as (1, C, 1, ...)."""

    @abstractmethod
    def sketched(self, x: Tensor, v: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What it makes of values of channels whose statistics are those of all data.

        Args:
            x: (C, P).
            v: slopes, of a shape that expands to (..., C, 1).
            mean: of the channels, (C,).
            var: of the channels, (C,).
        """

    @abstractmethod
    def slope_unit(self, var: Tensor) -> Tensor:
        """By what a slope is measured in channels of these variances."""

    @classmethod
    def chosen(
        cls, state: NormState, carry: Carry, *, nonlinearity: bool | None = None, **given: Any
    ) -> dict[str, Any]:
        """Activate where an activation follows that it can replace, or where it stands alone."""
        if nonlinearity is None:
            nonlinearity = not state.kind or not _why_not(state)
        return super().chosen(state, carry, nonlinearity=nonlinearity, **given)

    def pools(self, *, tracks: bool) -> Rule:
        """A curve of each value; a straight one, where it does not activate."""
        if self.v is None:
            return Rule.always(Curve())
        learned = not self.v.is_meta and bool((self.v != 1).any())
        form = type(self).__name__
        return Rule.always(_Evolved(channels=self.channels_per_group, curve=form, learned=learned))

    def started(self, state: NormState, start: Start) -> Start:
        """Take the activation that follows away, and come as near as can be to both."""
        why_not = _why_not(state)
        if not state.kind:
            return start
        if not self.nonlinearity:
            return start.noted(f"gain and offset alone: {why_not}" if why_not else "")
        follows = state.activation
        if why_not:
            return start.noted(f"activates besides: {why_not}")
        start = start.noted(f"stands for {follows.path} too")
        if start.rewrites_affine and not start.fresh:
            start = replace(start, values=partial(self._nearest, state))
        if follows.fused:
            return start
        return replace(start, beside=(*start.beside, Replaced(follows, nn.Identity)))

    def settle(self, state: NormState) -> None:
        """Keep the activation that it stands for, and run it no more if it was fused."""
        follows = state.activation
        if self.nonlinearity and follows.function is not None and not _why_not(state):
            self.replaced_act = as_module(follows.function)
            self.tail = tuple(name for name in self.tail if name != follows.fused)

    def retold(self) -> Mapping[str, Any]:
        """What it activates by runs behind another norm."""
        if not self.stands_for:
            return {}
        within = {self.stands_for: partial(self.get_submodule, self.stands_for)}
        return {"tail": (*self.tail, self.stands_for), "within": within}

    def _nearest(self, state: NormState) -> dict[str, Tensor]:
        """Weight, bias and slope that come nearest to the source and its activation.

        For each slope that is tried, gain and offset follow by least squares.
        """
        if state.running_mean is None or state.running_var is None:
            raise ValueError("the source keeps no running statistics")
        function: Any = state.activation.function
        mean, var = precise(state.running_mean), precise(state.running_var)
        gain, offset = state.gain_and_offset()
        center, var = state.rule.eval.expected(mean, var)
        slope = gain / state.rule.eval.divisor(var, state.eps)
        places, share = nodes(mean)
        x = mean[:, None] + precise(state.running_var).sqrt()[:, None] * places
        wanted = function(slope[:, None] * (x - center[:, None]) + offset[:, None])
        tried = torch.tensor([sign * each for each in SLOPES for sign in (1, -1)]).to(mean)
        slopes = tried[:, None] * self.slope_unit(precise(state.running_var))
        z = self.sketched(x, slopes[..., None], mean, precise(state.running_var))
        first, aim = (z * share).sum(-1), (wanted * share).sum(-1)
        spread = ((z - first[..., None]).square() * share).sum(-1)
        common = ((z - first[..., None]) * (wanted - aim[:, None]) * share).sum(-1)
        gains = common / spread.clamp(min=torch.finfo(mean.dtype).tiny)
        best = (gains * common).argmax(0, keepdim=True)
        best_gain = gains.gather(0, best)[0]
        dtype = state.reference().dtype
        return {
            "weight": best_gain.to(dtype),
            "bias": (aim - best_gain * first.gather(0, best)[0]).to(dtype),
            "v": slopes.gather(0, best)[0].to(dtype),
        }


def _why_not(state: NormState) -> str:
    """Why what follows the source cannot be taken over; empty if it can."""
    follows = state.activation
    if follows.problem:
        return follows.problem
    return "" if is_elementwise(follows.function) else f"{follows.path} is no plain activation"
