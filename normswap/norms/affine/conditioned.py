"""Norms whose affine follows an extra input, on any base that standardizes.

    weight · z + bias  becomes  (weight + gain) · z + (bias + offset)

where z is what the base makes of x, and gain and offset are predicted from the extra input. They
start at zero, so that a norm starts as its base is, with the base's weight and bias under their
own keys. Where gain and offset are a sample's, (N, C), everything is the base's own two passes
over x; where they are a position's they are applied to z.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.affine.bases import BASES, base_named, name_of_base
from normswap.norms.affine_norm import per_channel
from normswap.norms.entry import Option, whole
from normswap.norms.inputs.maps import refuse_untold
from normswap.norms.inputs.norm import InputNorm
from normswap.norms.measured import MeasuredNorm
from normswap.norms.moments import normalized
from normswap.norms.passes import work_dtype
from normswap.norms.plain import PlainNorm
from normswap.norms.remake import remade
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["ON_ANY_BASE", "ByPosition", "BySample", "ConditionedNorm", "conv"]

_OF_BASES = (
    whole("num_groups", None, 'of base="gn"; None: as for "gn"'),
    whole("group_size", None, 'of base="ghost_bn"; None: as for "ghost_bn"'),
)

#: The options of a norm that sits on any base.
ON_ANY_BASE = (Option("base", "bn", f"what standardizes: {', '.join(BASES)}"), *_OF_BASES)


class ConditionedNorm(InputNorm, MeasuredNorm):
    """A norm whose affine follows an extra input; a mixin before the class of a base."""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        each = (name for base in cls.__mro__ for name in vars(base).get("own", ()))
        cls.own = tuple(dict.fromkeys(each))

    @property
    def base(self) -> str:
        """The base's name."""
        return name_of_base(self)

    @classmethod
    def variant(cls, *, base: str | None = None, **given: Any) -> type[PlainNorm]:
        """This one on the base that is asked for, where it has none."""
        if base is None:
            return cls
        made: type[Any] = remade(cls, base_named(base).cls)
        return made

    @classmethod
    def chosen(
        cls, state: NormState, carry: Carry, *, base: str | None = None, **given: Any
    ) -> dict[str, Any]:
        """Refuse the options of another base."""
        takes = () if base is None else base_named(base).options
        for option in _OF_BASES:
            if given.get(option.name) is not None and option.name not in takes:
                raise OptionError(f"{option.name}= is no option of base={base!r}; leave it out")
        return super().chosen(state, carry, **given)

    def settings(self, names: Iterable[str]) -> dict[str, object]:
        """The values of options, of which another base may have some."""
        return {name: getattr(self, name, None) for name in names}

    def retold(self) -> dict[str, Any]:
        """The family of its base."""
        return {**super().retold(), "kind": base_named(self.base).kind}

    def standardized(self, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """What the base's rule makes of statistics, as it is: weight and bias come later."""
        gain = (spread + self.eps).rsqrt()
        return gain, -gain * centre

    def with_affine(self, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """What the base's rule makes, as it is: weight and bias come later."""
        return gain, offset


class BySample(ConditionedNorm):
    """Its gain and offset are those of each sample's channels."""

    @abstractmethod
    def predicted(self, mean: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to weight and to bias, of shapes that expand to (N, C); or nothing.

        Args:
            mean: of every sample's channel, (N, C), for the number of samples and the dtype.
        """

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """The base's rule, and the affine on what it makes."""
        gain, offset = super().rule(mean, var, positions)  # type: ignore[safe-super]
        with torch.autocast(mean.device.type, enabled=False):  # all of it is small
            weight, bias = self.affine_of(mean)
        return gain * weight, offset * weight + bias

    def affine_of(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of every sample's channel."""
        gain, offset = self.predicted(mean)
        weight = mean.new_ones(()) if self.weight is None else self.weight.to(mean.dtype)
        bias = mean.new_zeros(()) if self.bias is None else self.bias.to(mean.dtype)
        return weight if gain is None else weight + gain, bias if offset is None else bias + offset

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        return normalized(x, partial(self.rule, positions=math.prod(x.shape[2:])))


class ByPosition(ConditionedNorm):
    """Its gain and offset are those of each position."""

    spatial = True

    @classmethod
    def chosen(cls, state: NormState, carry: Carry, **given: Any) -> dict[str, Any]:
        """Refuse a map whose dimensions nothing tells, as kernels have to fit them."""
        refuse_untold(state)
        return super().chosen(state, carry, **given)

    @abstractmethod
    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to weight and to bias, (N, C, ...).

        Args:
            x: (N, C, ...), for sizes and dtype.
        """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        values = x.to(work_dtype(x))
        z = normalized(values, partial(self.rule, positions=math.prod(x.shape[2:])))
        gain, offset = self.predicted(z)
        gain = 1 + gain if self.weight is None else per_channel(self.weight, z) + gain
        offset = offset if self.bias is None else per_channel(self.bias, z) + offset
        return torch.addcmul(offset, z, gain).to(x.dtype)


def conv(dim: int | None) -> Any:
    """The class of convolutions of maps of 1, 2 or 3 dimensions."""
    return getattr(nn, f"Conv{dim}d")
