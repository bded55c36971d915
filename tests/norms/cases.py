"""Every norm that can be built, with the formula that it is to follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from normswap.norms.furnish import furnish
from normswap.norms.state import fresh_state
from tests.reference import batch_relatives, formulas
from tests.reference.data import fill, values
from tests.reference.formulas import Running
from tests.reference.sparsestmax import nearest

CHANNELS = 6

#: ``formula(x, weight, bias, running, **own) -> y``; it updates ``running`` where the norm does,
#: and is given by name what the norm learns beside weight and bias.
Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A norm with its options, and its formulas for inputs (N, C, ...)."""

    norm: str
    train: Formula
    eval: Formula
    options: Mapping[str, Any] = field(default_factory=dict)
    updates: bool = False

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        """The norm for inputs of a shape, in double precision, everything in it different."""
        module = normswap.build(
            self.norm, CHANNELS, dim=max(len(shape) - 2, 1), **dict(self.options)
        )
        return set_statistics(fill(module))

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.norm}({options})"


def start(norm: str, *, channel_dim: int, dim: int = 1, **options: Any) -> nn.Module:
    """A norm as a conversion makes it for a layer whose channels may be elsewhere."""
    state = replace(fresh_state(CHANNELS, dim=dim), channel_dim=channel_dim)
    made = furnish(state, normswap.spec(norm, **options).start(state))
    return set_statistics(fill(made.module))


def set_statistics(module: nn.Module) -> nn.Module:
    """Give the running statistics of a norm, if it has any, values that are all different."""
    if isinstance(getattr(module, "running_mean", None), Tensor):
        before = statistics()
        module.running_mean.copy_(before.mean)
        module.running_var.copy_(before.var)
    return module


def statistics() -> Running:
    """The running statistics that `set_statistics` gives."""
    return Running(values(CHANNELS, seed=7), values(CHANNELS, seed=8).abs() + 0.3)


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of weight and bias that take gradients; one and zero where there are none."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        weight, bias = torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double()
    return weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()


def own(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a norm learns beside weight and bias, by name; they take gradients."""
    return {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in module.named_parameters()
        if name not in ("weight", "bias")
    }


def _batch(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.batch_norm(x, weight, bias, running)


def _batch_untracked(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.batch_norm(x, weight, bias)


def _fixed(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.fixed_norm(x, weight, bias, running)


def _group(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.group_norm(x, weight, bias, 2)


def _instance(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.instance_norm(x, weight, bias)


def _instance_tracked(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.instance_norm(x, weight, bias, running)


def _layer(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.layer_norm_of_maps(x, weight, bias)


def _layer_2d(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.layer_norm_of_positions(x, weight, bias)


def _rms(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.rms_norm_of_maps(x, weight, bias)


def _rms_2d(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.rms_norm_of_positions(x, weight, bias)


def _channel(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.channel_norm(x, weight, bias)


def _channel_biased(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.channel_norm(x, weight, bias, unbiased=False)


def _ghost(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return formulas.ghost_batch_norm(x, weight, bias, running, 2)


def _nothing(x: Tensor, weight: Tensor, bias: Tensor, running: Running) -> Tensor:
    return x


def tracking(norm: str, formula: Formula, **options: Any) -> Case:
    """A norm that keeps running statistics, by a formula that is told whether it trains."""
    return Case(norm, formula, partial(formula, training=False), options, updates=True)


BATCH = Case("bn", _batch, _fixed, updates=True)
SYNC_OPTION = Case("bn", _batch, _fixed, {"sync": True}, updates=True)
SYNC = Case("sync_bn", _batch, _fixed, updates=True)
UNTRACKED = Case("bn", _batch_untracked, _batch_untracked, {"track_running_stats": False})
FROZEN = Case("frozen_bn", _fixed, _fixed)
GROUP = Case("gn", _group, _group, {"num_groups": 2})
INSTANCE = Case("in", _instance, _instance)
TRACKED_INSTANCE = Case(
    "in", _instance_tracked, _fixed, {"track_running_stats": True}, updates=True
)
LAYER = Case("ln", _layer, _layer)
LAYER_2D = Case("ln2d", _layer_2d, _layer_2d)
RMS = Case("rms", _rms, _rms)
RMS_2D = Case("rms2d", _rms_2d, _rms_2d)
CHANNEL = Case("cn", _channel, _channel)
BIASED_CHANNEL = Case("cn", _channel_biased, _channel_biased, {"unbiased": False})
GHOST = Case("ghost_bn", _ghost, _fixed, {"group_size": 2}, updates=True)
SWITCHABLE = tracking("sn", formulas.switchable_norm)
BIASED_SWITCHABLE = tracking(
    "sn", partial(formulas.switchable_norm, unbiased=False), unbiased=False
)
SPARSE = tracking("ssn", partial(formulas.switchable_norm, shares_of=nearest))
TWICE = tracking("bcn", partial(batch_relatives.batch_channel_norm, groups=1))
TWICE_IN_GROUPS = tracking(
    "bcn", partial(batch_relatives.batch_channel_norm, groups=2), num_groups=2
)
ESTIMATED = tracking(
    "bcn",
    partial(batch_relatives.batch_channel_norm, groups=3, estimated=True),
    channels_per_group=2,
    estimated=True,
)
EXTENDED = tracking("ebn", batch_relatives.extended_batch_norm)
BATCH_INSTANCE = tracking("bin", batch_relatives.batch_instance_norm)
INSTANCE_BATCH = tracking("ibn", partial(batch_relatives.instance_batch_norm, first=3))
MOSTLY_BATCH = tracking("ibn", partial(batch_relatives.instance_batch_norm, first=1), ratio=0.2)
ADAPTIVE = tracking("adaptive_bn", batch_relatives.adaptive_batch_norm)
ENHANCED = tracking("iebn", batch_relatives.instance_enhancement_batch_norm)
IDENTITY = Case("identity", _nothing, _nothing)

#: What measures each channel of a sample alone, and so needs more than one position.
SINGLE = [INSTANCE, TRACKED_INSTANCE, CHANNEL, BIASED_CHANNEL, INSTANCE_BATCH, MOSTLY_BATCH]

CASES = [
    BATCH,
    SYNC_OPTION,
    SYNC,
    UNTRACKED,
    FROZEN,
    GROUP,
    INSTANCE,
    TRACKED_INSTANCE,
    LAYER,
    LAYER_2D,
    RMS,
    RMS_2D,
    GHOST,
    CHANNEL,
    BIASED_CHANNEL,
    SWITCHABLE,
    BIASED_SWITCHABLE,
    SPARSE,
    TWICE,
    TWICE_IN_GROUPS,
    ESTIMATED,
    EXTENDED,
    BATCH_INSTANCE,
    INSTANCE_BATCH,
    MOSTLY_BATCH,
    ADAPTIVE,
    ENHANCED,
    IDENTITY,
]
