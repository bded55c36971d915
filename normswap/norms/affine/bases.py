"""The standardizations that the affine of an extra input may sit on.

Each is a norm by a rule, whose weight and bias are applied by somebody else. Batch, instance,
group and layer normalization are so here; as targets of their own they are torch's classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normswap.errors import OptionError, did_you_mean
from normswap.norms.affine.batch_instance import BatchInstanceNorm
from normswap.norms.grouped import chosen_groups
from normswap.norms.measured import MeasuredNorm, pooled
from normswap.norms.pool import Rule, per_group
from normswap.norms.standardization.extended import ExtendedBatchNorm
from normswap.norms.state import batch_rule
from normswap.norms.statistics.ghost import GhostBatchNorm
from normswap.norms.statistics.switchable import SwitchableNorm

__all__ = ["BASES", "Base", "PlainBatchNorm", "PlainInstanceNorm", "base_named", "name_of_base"]


class PlainBatchNorm(MeasuredNorm):
    """Batch normalization.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.
    """

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the batch, in eval mode by the running statistics."""
        return self.standardized(*self.over_batch(mean, var, positions))

    def pools(self, *, tracks: bool) -> Rule:
        """The batch."""
        return batch_rule(tracks=tracks)


class _OfSample(MeasuredNorm):
    """A norm that looks at each sample by itself, and keeps nothing."""

    tracks = False
    synchronizes = False


class PlainInstanceNorm(_OfSample):
    """Instance normalization.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward on maps of one position.
    """

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize each channel of a sample by itself."""
        self.refuse_single_value(positions, "use a larger map")
        return self.standardized(mean, var)

    def pools(self, *, tracks: bool) -> Rule:
        """Each channel of a sample."""
        return Rule.always(per_group(1))


class PlainGroupNorm(_OfSample):
    """Group normalization.

    Args:
        num_features: C.
        num_groups: default as for `GroupNorm`'s entry in the registry.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward where every group holds a single value.
    """

    def __init__(self, num_features: int, *, num_groups: int | None = None, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.num_groups = chosen_groups(num_features, num_groups, None)

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the groups of a sample."""
        size = self.num_features // self.num_groups
        self.refuse_single_value(size * positions, "use fewer groups or a larger map")
        groups = (len(mean), self.num_groups, size)
        centre, spread = pooled(mean.view(groups), var.view(groups), 2)
        whole = (each.expand(groups).flatten(1) for each in (centre, spread))
        return self.standardized(*whole)

    def pools(self, *, tracks: bool) -> Rule:
        """A group of channels of a sample."""
        return Rule.always(per_group(self.num_features // self.num_groups))


class PlainLayerNorm(_OfSample):
    """Layer normalization of a whole map.

    Args:
        num_features: C.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward where every sample holds a single value.
    """

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the sample."""
        self.refuse_single_value(self.num_features * positions, "use a larger map")
        return self.standardized(*pooled(mean, var, 1))

    def pools(self, *, tracks: bool) -> Rule:
        """A sample."""
        return Rule.always(per_group(self.num_features))


@dataclass(frozen=True)
class Base:
    """One standardization.

    Args:
        cls: its class.
        kind: its family.
        options: the names of those that it has alone.
    """

    cls: type[MeasuredNorm]
    kind: str = "batch_norm"
    options: tuple[str, ...] = ()


#: By the name in the registry.
BASES = {
    "bn": Base(PlainBatchNorm),
    "in": Base(PlainInstanceNorm, "instance_norm"),
    "gn": Base(PlainGroupNorm, "group_norm", ("num_groups",)),
    "ln": Base(PlainLayerNorm, "layer_norm"),
    "ghost_bn": Base(GhostBatchNorm, options=("group_size",)),
    "ebn": Base(ExtendedBatchNorm),
    "bin": Base(BatchInstanceNorm),
    "sn": Base(SwitchableNorm, "switchable_norm"),
}


def base_named(name: str) -> Base:
    """The base of a name.

    Raises:
        OptionError: there is none.
    """
    if name not in BASES:
        known = ", ".join(BASES)
        raise OptionError(f"base={name!r} is none of {known}.{did_you_mean(str(name), BASES)}")
    return BASES[name]


def name_of_base(norm: MeasuredNorm) -> str:
    """The name of the base that a norm sits on."""
    return next(name for name, base in BASES.items() if isinstance(norm, base.cls))
