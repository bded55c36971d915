"""What a norm measures of each batch, read from the norm itself while it computes.

In train mode a norm computes its batch's mean and variance anyway. With momentum 1 it writes them
to its running buffers, so they are read there and cost nothing. Small operations amid large ones
are slow, on any device: there is none while a forward runs, if the norm is called once in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.graph.site import NormSite
from normswap.norms.measured import MeasuredNorm
from normswap.norms.statistics.batch import SynchronizedBatchNorm
from normswap.stats.accumulate import Batch, precise
from normswap.stats.moments import FAR, FAR_IN_DOUBLE, channel_moments, refined
from normswap.stats.probe import Probe

__all__ = ["UNTOUCHED", "Meter", "Receive"]

#: Called after each call of a norm with what it measured, which stays as it is until the `Meter`
#: is told to be ready again; a norm that measures nothing, as on an empty batch, leaves the
#: variance at `UNTOUCHED`.
Receive = Callable[[NormSite, Batch], None]

UNTOUCHED = -1.0
#: A batch may be as many times farther from zero than those before it.
MARGIN = 8


class Meter(Probe):
    """Lets a norm run in train mode and reports every call's statistics.

    Args:
        site: where the norm is.
        receive: what is told of every call.
        plain: measure the batch's mean and unbiased variance, whatever the norm divides by; else
            what it keeps in training.

    Attributes:
        distance: how many standard deviations from zero its inputs are, as far as is known: far
            from there it measures too coarsely, and what it measured is looked at.
    """

    def __init__(self, site: NormSite, receive: Receive, *, plain: bool = True) -> None:
        super().__init__(site)
        self._plain = plain or not isinstance(self.module, MeasuredNorm)
        self.distance = math.inf
        self._receive = receive
        self._alone: Tensor | None = None
        self._told = False
        # Whether a call may leave its input as another: nobody knows before the first.
        self._overwrites = True
        self._version: int | None = None
        self._aside: tuple[Tensor, Tensor] | None = None

    def attributes(self) -> dict[str, Any]:
        """Momentum 1 and train mode; and ranks that do not wait for each other in forward."""
        module = self.site.module
        measures: dict[str, Any] = {"momentum": 1.0, "training": True}
        if isinstance(module, MeasuredNorm):
            passive = {"sync": False, "plain_statistics": self._plain, "observed": True}
            return measures | passive
        if not (dist.is_available() and dist.is_initialized()):
            return measures
        if isinstance(module, SynchronizedBatchNorm):
            return measures | {"sync": False}
        if isinstance(module, nn.SyncBatchNorm):
            return measures | {"forward": _LocalForward(module, self.site.state.tail)}
        return measures

    def attach(self) -> None:
        """Lend the norm its scratch buffers, ready to be written to."""
        super().attach()
        self.ready()

    def ready(self) -> None:
        """Let the next calls overwrite what was told of the last ones."""
        mean, var = self.scratch
        mean.zero_()
        var.fill_(UNTOUCHED)
        self._told = False

    def before(self, x: Tensor) -> None:
        """Make room for what will be measured."""
        if self._told:
            mean, var = self.scratch
            self.lend(torch.empty_like(mean), torch.empty_like(var))
            self.ready()
        self._count = x.numel() // self.site.num_features
        self._samples = x.shape[0]
        if self._count < 2:
            self.module.training = False
        if self._count == 1:
            # torch refuses to train on a single value; its output would be the bias, which is
            # what evaluation gives when the mean is that value.
            mean, var = self.scratch
            var.fill_(1.0)
            mean.copy_(x.detach().movedim(self.site.channel_dim, 1).reshape(-1))
            self._alone = precise(mean)
        self._version = _version(x)
        self._aside = None
        if self._overwrites and self._is_coarse(x):
            self._aside = channel_moments(x.detach(), self.site.channel_dim)

    def after(self, x: Tensor) -> None:
        """Tell what was measured."""
        if self._count < 2:
            self.module.training = True
        self._told = True
        if self._alone is not None:
            batch = Batch(1, self._samples, self._alone, torch.zeros_like(self._alone))
            self._alone = None
            return self._receive(self.site, batch)
        mean, var = self.scratch
        self._overwrites = self._version is None or _version(x) != self._version
        if self._is_coarse(x):
            if not self._overwrites:
                coarse = precise(mean), precise(var)
                mean, var = refined(x, self.site.channel_dim, *coarse, far=_far(x))
            elif self._aside is not None:
                mean, var = self._aside
        self._aside = None
        self._receive(self.site, Batch(self._count, self._samples, mean, var))

    def _is_coarse(self, x: Tensor) -> bool:
        """Whether what the norm measures of x may be too coarse, by what is known before."""
        pools = self._plain and self._count > 1 and self.site.state.rule.train.meets
        return pools and x.dtype != torch.float64 and self.distance * MARGIN > _far(x)


def _far(x: Tensor) -> float:
    """How many standard deviations from zero torch's own measurement of x holds out."""
    return FAR_IN_DOUBLE if x.is_contiguous() else FAR


def _version(x: Tensor) -> int | None:
    """A number that changes when x is overwritten; ``None`` where torch counts nothing."""
    return None if x.is_inference() else x._version


class _LocalForward:
    """The forward of a SyncBatchNorm without synchronisation."""

    def __init__(self, module: nn.SyncBatchNorm, tail: tuple[str, ...]) -> None:
        self.module, self.tail = module, tail

    def __call__(self, input: Tensor) -> Tensor:
        y = _BatchNorm.forward(self.module, input)
        for name in self.tail:
            y = getattr(self.module, name)(y)
        return y
