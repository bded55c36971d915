"""Norms in plain torch that treat groups of consecutive channels each by itself."""

from __future__ import annotations

from typing import Any

from normswap.norms.group import chosen_groups, default_groups
from normswap.norms.plain import PlainNorm
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["GroupedNorm"]


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
