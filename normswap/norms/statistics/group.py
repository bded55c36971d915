"""GroupNorm.

Wu and He, "Group Normalization", ECCV 2018, arXiv 1803.08494.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, EPS, MAP_SOURCES, NormEntry
from normswap.norms.grouped import GROUPS, chosen_groups
from normswap.norms.pool import Rule, per_group
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "OPTIONS", "GroupNorm"]


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
