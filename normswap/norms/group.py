"""GroupNorm.

Wu and He, "Group Normalization", ECCV 2018, arXiv 1803.08494.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, EPS, NormEntry, Option
from normswap.norms.pool import Rule, per_group
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = [
    "ENTRIES",
    "GROUPS",
    "MAP_SOURCES",
    "OPTIONS",
    "GroupNorm",
    "chosen_groups",
    "default_groups",
]

#: Families of feature maps: what norms of one sample's map convert when not told otherwise.
MAP_SOURCES = frozenset({"batch_norm", "group_norm", "instance_norm"})

MOST_GROUPS = 32
LEAST_CHANNELS = 16


class GroupNorm(Norm, nn.GroupNorm):
    """`torch.nn.GroupNorm` with normswap's layout and tail, which refuses groups of one value.

    Raises:
        DegeneratePooling: at a forward where every group holds a single value.
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) per sample and group of consecutive channels."""
        values = self.num_channels // self.num_groups * math.prod(x.shape[2:])
        self.refuse_single_value(values, "use fewer groups or a larger map")
        return super().normalize(x)


def default_groups(num_features: int) -> int:
    """The largest divisor of C that is at most 32 and leaves at least 16 channels in a group.

    64 channels make 4 groups, 128 make 8, 512 and more make 32; below 32 channels there is one.
    """
    return max(
        groups
        for groups in range(1, MOST_GROUPS + 1)
        if num_features % groups == 0 and (groups == 1 or num_features // groups >= LEAST_CHANNELS)
    )


def start_group_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    eps: float | None = None,
    affine: bool | None = None,
    made_of: type[GroupNorm] = GroupNorm,
) -> Start:
    """Start a GroupNorm; from running statistics its affine is moment-matched, without data."""
    groups = chosen_groups(state.num_features, num_groups, channels_per_group)
    channels = state.num_features // groups

    def shell() -> nn.Module:
        return place(
            made_of(
                groups,
                state.num_features,
                eps=state.eps if eps is None else eps,
                affine=False,
            ),
            state,
        )

    note = f"{groups} groups of {channels}"
    rule = Rule.always(per_group(channels))
    return begin(state, shell, rule, carry=carry, eps=eps, affine=affine, note=note)


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


def read_group_norm(module: nn.Module) -> NormState:
    """Read torch's GroupNorm or ours."""
    if not isinstance(module, nn.GroupNorm):
        raise TypeError(f"expected a GroupNorm, got {type(module).__name__}")
    channels = module.num_channels // module.num_groups
    return NormState(
        norm="gn",
        kind="group_norm",
        num_features=module.num_channels,
        rule=Rule.always(per_group(channels)),
        eps=module.eps,
        settings={
            "num_groups": module.num_groups,
            "channels_per_group": channels,
            "eps": module.eps,
            "affine": module.affine,
        },
        **tensors(module),
        **layout(module),
    )


GROUPS = (
    Option("num_groups", None, "None: the largest divisor ≤ 32 that leaves ≥ 16 channels"),
    Option("channels_per_group", None, "instead of num_groups"),
)
OPTIONS = (*GROUPS, EPS, AFFINE)

ENTRIES = (
    NormEntry(
        name="gn",
        aliases=("group_norm", "groupnorm"),
        kind="group_norm",
        axis="statistics",
        pooled="a group of channels × H·W, per sample",
        paper="Wu and He 2018, arXiv 1803.08494",
        sources=MAP_SOURCES,
        start=start_group_norm,
        reads={nn.GroupNorm: read_group_norm, GroupNorm: read_group_norm},
        options=OPTIONS,
    ),
)
