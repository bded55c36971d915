"""Norms in plain torch that treat groups of consecutive channels each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normswap.errors import OptionError
from normswap.norms.entry import Option
from normswap.norms.plain import PlainNorm
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["GROUPS", "GroupedNorm", "chosen_groups", "default_groups"]

MOST_GROUPS = 32
LEAST_CHANNELS = 16

GROUPS = (
    Option("num_groups", None, "None: the largest divisor ≤ 32 that leaves ≥ 16 channels"),
    Option("channels_per_group", None, "instead of num_groups"),
)


def default_groups(num_features: int) -> int:
    """The largest divisor of C that is at most 32 and leaves at least 16 channels in a group.

    64 channels make 4 groups, 128 make 8, 512 and more make 32; below 32 channels there is one.
    """
    return max(
        groups
        for groups in range(1, MOST_GROUPS + 1)
        if num_features % groups == 0 and (groups == 1 or num_features // groups >= LEAST_CHANNELS)
    )


def chosen_groups(
    num_features: int,
    num_groups: int | None,
    channels_per_group: int | None,
    *,
    default: Callable[[int], int] = default_groups,
) -> int:
    """How many groups there are to be, by either option or by a default for the channels.

    Raises:
        OptionError: both options are given, or one that does not divide.
    """
    if num_groups is not None and channels_per_group is not None:
        raise OptionError("num_groups and channels_per_group exclude each other: give one of them")
    for name, size in (("num_groups", num_groups), ("channels_per_group", channels_per_group)):
        if size is None:
            continue
        if not isinstance(size, int) or size < 1 or num_features % size:
            divisors = [d for d in range(1, num_features + 1) if num_features % d == 0]
            raise OptionError(
                f"{name}={size!r} does not divide its {num_features} channels; it can be one of "
                f"{divisors}; leave the option out for a number that divides every layer's "
                "channels, or this layer by skip="
            )
        return size if name == "num_groups" else num_features // size
    return default(num_features)


class GroupedNorm(PlainNorm):
    """Mixed in before another kind of norm: it has groups of consecutive channels.

    Args:
        num_features: C.
        num_groups: how many groups; by default as many as `default_groups` says.
        **rest: as for the other kind.
    """

    def __init__(self, num_features: int, *, num_groups: int | None = None, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.num_groups = num_groups or self.default_groups(num_features)

    @staticmethod
    def default_groups(num_features: int) -> int:
        """How many groups there are where nothing is said."""
        return default_groups(num_features)

    @property
    def channels_per_group(self) -> int:
        """How many channels a group has."""
        return self.num_features // self.num_groups

    @classmethod
    def chosen(
        cls,
        state: NormState,
        carry: Carry,
        *,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Choose groups by either option."""
        size, default = state.num_features, cls.default_groups
        groups = chosen_groups(size, num_groups, channels_per_group, default=default)
        return super().chosen(state, carry, num_groups=groups, **given)
