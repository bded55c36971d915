"""Norms that are no arithmetic on each channel's mean and variance, with their formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import normswap
from normswap.norms.furnish import furnish
from normswap.norms.state import fresh_state
from tests.reference import activating, beyond, own_terms
from tests.reference.beyond import Formula, Tensors
from tests.reference.data import fill, values

CHANNELS = 6
SHAPES = [(4, CHANNELS), (4, CHANNELS, 5), (4, CHANNELS, 3, 4), (4, CHANNELS, 2, 3, 2)]


@dataclass(frozen=True)
class Beyond:
    """A norm with its options, its formula and the shapes of inputs that it takes.

    ``spread`` is a factor for its parameters: those of softmaxes that saturate leave regions of
    hardly any positions, whose statistics no two formulas agree on to many digits. ``of_ranks``
    makes the formula where it depends on how many samples each rank has.
    """

    norm: str
    formula: Formula
    options: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = tuple(SHAPES)
    autograd: bool = True
    spread: float = 1.0
    of_ranks: Callable[..., Formula] | None = None

    def build(self, dim: int = 2) -> nn.Module:
        """The norm in double precision, every number in it different."""
        return self.filled(normswap.build(self.norm, CHANNELS, dim=dim, **self.options))

    def on_tokens(self) -> nn.Module:
        """The same as a conversion makes it for a layer whose channels come last."""
        state = replace(fresh_state(CHANNELS, dim=1), channel_dim=-1)
        start = normswap.spec(self.norm, **self.options).start(state)
        return self.filled(furnish(state, start).module)

    def filled(self, module: nn.Module) -> nn.Module:
        """Double precision, and numbers that are all different."""
        fill(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(self.spread)
        return set_buffers(module)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.norm}({options})"


def set_buffers(module: nn.Module) -> nn.Module:
    """Give what a norm keeps values that are all different, and that it may have."""
    for index, (name, buffer) in enumerate(module.named_buffers()):
        if not buffer.is_floating_point():
            continue
        new = values(*buffer.shape, seed=7 + index)
        if "mean" not in name:
            new = new.abs() + 0.3
        buffer.copy_(new)
    return module


def parameters_of(module: nn.Module) -> Tensors:
    """Copies of the parameters, which take gradients."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def buffers_of(module: nn.Module) -> Tensors:
    """Copies of the buffers."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether the same tensors hold the same values, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


BEYOND = [
    Beyond("frn", activating.filter_response_norm, shapes=tuple(SHAPES[1:])),
    Beyond("frn", activating.filter_response_norm, {"learned_eps": True}),
    Beyond("evonorm_b0", activating.evonorm_b0),
    Beyond("evonorm_s0", activating.evonorm_s0(6)),
    Beyond("evonorm_s0", activating.evonorm_s0(2), {"num_groups": 2}),
    Beyond("evonorm_s0", activating.evonorm_s0(3), {"channels_per_group": 2}),
    Beyond("evonorm_b0", activating.straight, {"nonlinearity": False}),
    Beyond("dyt", beyond.dynamic_tanh),
    Beyond("derf", beyond.dynamic_erf),
    Beyond("scale_norm", beyond.scale_norm),
    Beyond("scale_norm", beyond.scale_norm, {"affine": True}),
    Beyond("l1_bn", beyond.l1_batch_norm),
    Beyond("lcn", beyond.local_context_norm(2, 227)),
    Beyond("lcn", beyond.local_context_norm(2, 3), {"window": 3}),
    Beyond("lcn", beyond.local_context_norm(3, 2), {"channels_per_group": 3, "window": 2}),
    *(
        Beyond("rn_l", beyond.learned_region_norm(**options), options, tuple(SHAPES[1:]))
        for options in ({}, {"per_sample": True}, {"eps_scaled": False, "threshold": 0.5})
    ),
    *(
        Beyond(
            "an_wang",
            beyond.attentive_norm(n, official=code),
            options,
            tuple(SHAPES[1:]),
            spread=0.5,
        )
        for n, code, options in (
            (16, False, {}),
            (3, False, {"num_regions": 3}),
            (2, True, {"num_regions": 2, "official": True}),
        )
    ),
    *(
        Beyond("power_norm", formula, options, autograd=False)
        for formula, options in (
            (beyond.power_norm(10_000), {}),
            (beyond.power_norm(2), {"warmup": 2}),
            (beyond.power_norm(0, group_scale=False), {"warmup": 0, "group_scale": False}),
        )
    ),
    Beyond("mabn", beyond.moving_average_batch_norm(16, 100)),
    Beyond(
        "mabn",
        beyond.moving_average_batch_norm(2, 0),
        {"buffer_size": 2, "warmup": 0},
        autograd=False,
    ),
    Beyond("batch_renorm", own_terms.batch_renorm()),
    Beyond(
        "batch_renorm",
        own_terms.batch_renorm(1.5, 0.4),
        {"r_max": 1.5, "d_max": 0.4},
        autograd=False,
    ),
    Beyond("transnorm", own_terms.trans_norm(), autograd=False, of_ranks=own_terms.trans_norm),
    Beyond("an", own_terms.attentive_batch_norm(2)),
    *(
        Beyond(
            "an",
            own_terms.attentive_batch_norm(way, 3),
            {"attention": way, "num_mixtures": 3},
        )
        for way in range(7)
    ),
    Beyond("iter_norm", beyond.iterative_norm(1)),
    Beyond("iter_norm", beyond.iterative_norm(2), {"num_groups": 2}),
    Beyond("iter_norm", beyond.iterative_norm(3, 2), {"channels_per_group": 2, "iterations": 2}),
]
