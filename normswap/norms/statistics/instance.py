"""InstanceNorm of 1, 2 and 3 dimensions.

Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
Stylization", 2016, arXiv 1607.08022.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.errors import CannotConvert
from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, EPS, MAP_SOURCES, MOMENTUM, NormEntry, flag
from normswap.norms.pool import RUNNING, Rule, per_group
from normswap.norms.reading import dimension, layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class _MapNorm(Norm, _InstanceNorm):
    """Mixed in before a torch InstanceNorm: refuses maps of one position, and is faster."""

    dim: ClassVar[int]

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) per sample and channel; (C, ...) is one sample, as in torch."""
        if self.track_running_stats and not self.training:
            return super().normalize(x)
        one_sample = x.ndim == self.dim + 1 and x.shape[0] == self.num_features
        values = math.prod(x.shape[1 if one_sample else 2 :])
        self.refuse_single_value(values, "use a larger map")
        usual = x.ndim == self.dim + 2 and x.shape[1] == self.num_features and values > 0
        if self.track_running_stats or not (usual and x.is_cpu and x.is_contiguous()):
            return super().normalize(x)
        # What torch's InstanceNorm does on the processor, in half the time. Channels last it would
        # be coarser.
        return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class InstanceNorm1d(_MapNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with normswap's layout and tail."""

    dim = 1


class InstanceNorm2d(_MapNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with normswap's layout and tail."""

    dim = 2


class InstanceNorm3d(_MapNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with normswap's layout and tail."""

    dim = 3


_TORCH = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_OURS = {1: InstanceNorm1d, 2: InstanceNorm2d, 3: InstanceNorm3d}


def _rule(*, tracks: bool) -> Rule:
    return Rule(per_group(1), RUNNING if tracks else per_group(1))


def start_instance_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
    track_running_stats: bool | None = None,
) -> Start:
    """Start an InstanceNorm; with ``track_running_stats=True`` it evaluates as BatchNorm did."""
    if state.channel_dim == 1 and state.dim not in _OURS:
        raise CannotConvert(
            "nothing tells how many dimensions its input has", "give example_inputs"
        )
    dim = state.dim if state.channel_dim == 1 and state.dim is not None else 1
    if track_running_stats is None:
        track_running_stats = state.kind == "instance_norm" and state.tracks

    def shell() -> nn.Module:
        module = _OURS[dim](
            state.num_features,
            eps=state.eps if eps is None else eps,
            momentum=_momentum(state) if momentum is None else momentum,
            affine=False,
            track_running_stats=False,
        )
        return place(module, state)

    return begin(
        state,
        shell,
        _rule(tracks=track_running_stats),
        carry=carry,
        eps=eps,
        affine=affine,
        running=track_running_stats,
    )


def _momentum(state: NormState) -> float:
    # torch's InstanceNorm has no cumulative average: its momentum is always a number.
    return 0.1 if state.momentum is None else state.momentum


def read_instance_norm(module: nn.Module) -> NormState:
    """Read torch's InstanceNorm or ours."""
    if not isinstance(module, _InstanceNorm):
        raise TypeError(f"expected an InstanceNorm, got {type(module).__name__}")
    given = tensors(module)
    tracks = module.track_running_stats
    return NormState(
        norm="in",
        kind="instance_norm",
        num_features=module.num_features,
        rule=_rule(tracks=tracks),
        eps=module.eps,
        momentum=module.momentum,
        dim=dimension(module, *_TORCH.values()),
        settings={
            "eps": module.eps,
            "momentum": module.momentum,
            "affine": given["weight"] is not None,
            "track_running_stats": tracks,
        },
        **given,
        **layout(module),
    )


ENTRIES = (
    NormEntry(
        name="in",
        aliases=("instance_norm", "instancenorm"),
        kind="instance_norm",
        axis="statistics",
        pooled="H·W, per sample and channel",
        paper="Ulyanov et al. 2016, arXiv 1607.08022",
        sources=MAP_SOURCES,
        start=start_instance_norm,
        reads=dict.fromkeys((*_TORCH.values(), *_OURS.values()), read_instance_norm),
        options=(
            EPS,
            MOMENTUM,
            AFFINE,
            flag("track_running_stats", None, "evaluate with running statistics; None: as an in"),
        ),
        needs=frozenset({"dim"}),
    ),
)
