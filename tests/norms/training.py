"""One training run of a norm, on one rank of many or by the formula on all batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.norms.cases import CHANNELS, affine, start, statistics
from tests.reference import batch_relatives, formulas
from tests.reference.data import values
from tests.reference.formulas import Running
from tests.reference.sparsestmax import nearest

STEPS = 3

#: How many samples each rank has, by how many ranks there are.
CUTS = {
    2: {"even": (2, 2), "uneven": (3, 1), "empty": (4, 0)},
    3: {"even": (2, 2, 2), "uneven": (4, 1, 2), "empty": (2, 0, 3)},
}


@dataclass(frozen=True)
class Setting:
    """A synchronised norm, and the shape of its samples."""

    norm: str
    sample: tuple[int, ...] = (CHANNELS, 3, 2)
    channel_dim: int = 1
    momentum: float | None = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    formula: Callable[..., Tensor] = formulas.batch_norm

    def build(self) -> torch.nn.Module:
        """The norm, the same on every rank."""
        dim = max(len(self.sample) - 1, 1)
        module = start(self.norm, channel_dim=self.channel_dim, dim=dim, **self.options)
        module.momentum = self.momentum
        return module

    def batch(self, samples: int, step: int) -> Tensor:
        """What all ranks together see at a step."""
        return values(samples, *self.sample, seed=50 + step)


SYNC_OPTION = {"sync": True}
switchable = formulas.switchable_norm
SETTINGS = {
    "bn": Setting("bn", options=SYNC_OPTION),
    "bn without positions": Setting("bn", (CHANNELS,), options=SYNC_OPTION),
    "bn in 1d": Setting("bn", (CHANNELS, 4), options=SYNC_OPTION),
    "bn in 3d": Setting("bn", (CHANNELS, 2, 1, 3), options=SYNC_OPTION),
    "bn of tokens": Setting("bn", (4, CHANNELS), channel_dim=-1, options=SYNC_OPTION),
    "bn without momentum": Setting("bn", momentum=None, options=SYNC_OPTION),
    "bn without affine": Setting("bn", options={**SYNC_OPTION, "affine": False}),
    "bn untracked": Setting("bn", options={**SYNC_OPTION, "track_running_stats": False}),
    "sn": Setting("sn", options=SYNC_OPTION, formula=switchable),
    "sn without positions": Setting("sn", (CHANNELS,), options=SYNC_OPTION, formula=switchable),
    "sn of tokens": Setting(
        "sn", (4, CHANNELS), channel_dim=-1, options=SYNC_OPTION, formula=switchable
    ),
    "sn without momentum": Setting("sn", momentum=None, options=SYNC_OPTION, formula=switchable),
    "sn biased": Setting(
        "sn",
        options={**SYNC_OPTION, "unbiased": False},
        formula=partial(switchable, unbiased=False),
    ),
    "bcn": Setting(
        "bcn",
        options={**SYNC_OPTION, "num_groups": 2},
        formula=partial(batch_relatives.batch_channel_norm, groups=2),
    ),
    "bcn estimated": Setting(
        "bcn",
        options={**SYNC_OPTION, "num_groups": 2, "estimated": True},
        formula=partial(batch_relatives.batch_channel_norm, groups=2, estimated=True),
    ),
    "ssn": Setting("ssn", options=SYNC_OPTION, formula=partial(switchable, shares_of=nearest)),
    "sync_bn": Setting("sync_bn"),
    "sync_bn without positions": Setting("sync_bn", (CHANNELS,)),
    "sync_bn of tokens": Setting("sync_bn", (4, CHANNELS), channel_dim=-1),
    "sync_bn without momentum": Setting("sync_bn", momentum=None),
}


def run(
    forward: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    setting: Setting,
    samples: int,
    mine: slice,
) -> dict[str, list[Tensor]]:
    """Train a norm for three steps on its part of every batch.

    The loss weighs every output differently, so that no gradient vanishes by symmetry.

    Returns:
        Outputs, the inputs' gradients and the gradients of a sum of these gradients by step, and
        at the end the gradients that the parameters gathered.
    """
    seen: dict[str, list[Tensor]] = {"outputs": [], "gradients": [], "second": []}
    for step in range(STEPS):
        x = setting.batch(samples, step)[mine].requires_grad_()
        y = forward(x)
        loss = (y * setting.batch(samples, step + 10)[mine]).sum()
        wanted = [x, *parameters]
        gradient, *rest = torch.autograd.grad(loss, wanted, create_graph=True)
        for parameter, share in zip(parameters, rest, strict=True):
            gathered = 0 if parameter.grad is None else parameter.grad
            parameter.grad = gathered + share.detach()
        curvature = (gradient * setting.batch(samples, step + 20)[mine]).sum()
        (second,) = torch.autograd.grad(curvature, [x])
        seen["outputs"].append(y.detach())
        seen["gradients"].append(gradient.detach())
        seen["second"].append(second)
    seen["parameters"] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return seen


def run_one_rank(setting: Setting, cut: tuple[int, ...], rank: int) -> dict[str, Any]:
    """Train a setting's norm on one rank's part."""
    norm = setting.build()
    before = sum(cut[:rank])
    mine = slice(before, before + cut[rank])
    result: dict[str, Any] = run(norm, list(norm.parameters()), setting, sum(cut), mine)
    result["buffers"] = dict(norm.named_buffers())
    return result


def run_by_formula(setting: Setting, samples: int) -> tuple[dict[str, list[Tensor]], Running]:
    """Train the formula on all samples at once."""
    norm, running = setting.build(), statistics()
    weight, bias = affine(norm)
    others = [
        parameter.detach().clone().requires_grad_()
        for name, parameter in norm.named_parameters()
        if name not in ("weight", "bias")
    ]

    def forward(x: Tensor) -> Tensor:
        moved = x.movedim(setting.channel_dim, 1)
        y = setting.formula(moved, weight, bias, running, *others, momentum=setting.momentum)
        return y.movedim(1, setting.channel_dim)

    parameters = [weight, bias, *others] if list(norm.parameters()) else []
    return run(forward, parameters, setting, samples, slice(None)), running
