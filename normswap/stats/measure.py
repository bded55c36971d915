"""What a norm measures of each batch, read from the norm itself while it computes.

In train mode a norm computes its batch's mean and variance anyway. With momentum 1 it writes them
to its running buffers, so they are read there and cost nothing. The buffers that it writes to are
scratch, in single precision at least: the model's own are touched only when all is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.graph.site import NormSite
from normswap.norms.batch import SynchronizedBatchNorm
from normswap.norms.functional import own_for_a_while, refer_again, referred
from normswap.stats.accumulate import Batch, precise

__all__ = ["UNTOUCHED", "Receive", "measuring"]

#: Called after each call of a norm with what it measured; a norm that measures nothing, as on an
#: empty batch, leaves the variance at `UNTOUCHED`.
Receive = Callable[[NormSite, Batch], None]

UNTOUCHED = -1.0
_SCRATCH = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def measuring(sites: list[NormSite], receive: Receive) -> Iterator[None]:
    """Let norms run in train mode and report every call's statistics, within the block.

    On leaving, also by an exception, each norm has its own buffers, parameters, momentum and
    forward again, untouched.

    Args:
        sites: norms with running statistics, each module once.
        receive: what is told of every call.
    """
    meters = [_Meter(site, receive) for site in sites]
    try:
        for meter in meters:
            meter.attach()
        yield
    finally:
        for meter in meters:
            meter.detach()


class _Meter:
    """One norm under measurement."""

    def __init__(self, site: NormSite, receive: Receive) -> None:
        self.site = site
        self.module: Any = site.module
        self.receive = receive
        self.handles: list[Any] = []
        names = referred(self.module).keys() & set(_SCRATCH)
        self.of_owner = {name: vars(self.module)[name] for name in names}
        self.refers: dict[str, str] = {}
        self.buffers = dict(self.module._buffers)
        self.parameters = dict(self.module._parameters)
        self.momentum = self.module.momentum
        self.local = _local_attributes(site)
        self.shadowed = {
            name: vars(self.module)[name] for name in self.local if name in vars(self.module)
        }
        self.alone: Tensor | None = None

    def attach(self) -> None:
        module = self.module
        self.refers = own_for_a_while(module, _SCRATCH)
        self.buffers = dict(module._buffers)
        for name in _SCRATCH:
            own = self.buffers.get(name)
            if own is not None:
                dtype = torch.promote_types(own.dtype, torch.float32)
                scratch = own.to(dtype) if own.is_floating_point() else own
                module._buffers[name] = scratch.clone()
        for name, own in self.parameters.items():
            if own is not None and own.dtype in (torch.float16, torch.bfloat16):
                module._parameters[name] = nn.Parameter(own.detach().float(), requires_grad=False)
        module.momentum = 1.0
        vars(module).update(self.local)
        self.handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.module._buffers.update(self.buffers)
        self.module._parameters.update(self.parameters)
        refer_again(self.module, self.refers, self.of_owner)
        self.module.momentum = self.momentum
        for name in self.local:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.shadowed)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        mean, var = self._scratch()
        self.count = x.numel() // self.site.num_features
        self.samples = x.shape[0]
        mean.zero_()
        var.fill_(UNTOUCHED)
        if self.count > 1:
            module.training = True
            return
        if self.count == 0:
            module.training = False
            return
        # torch refuses to train on a single value; its output would be the bias, which is what
        # evaluation gives when the mean is that value.
        module.training = False
        var.fill_(1.0)
        mean.copy_(x.detach().movedim(self.site.channel_dim, 1).reshape(-1))
        self.alone = precise(mean)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        module.training = True
        mean, var = self._scratch()
        if self.alone is not None:
            batch = Batch(1, self.samples, self.alone, torch.zeros_like(self.alone))
            self.alone = None
            self.receive(self.site, batch)
        else:
            self.receive(self.site, Batch(self.count, self.samples, precise(mean), precise(var)))

    def _scratch(self) -> tuple[Tensor, Tensor]:
        return self.module._buffers["running_mean"], self.module._buffers["running_var"]


def _local_attributes(site: NormSite) -> dict[str, Any]:
    """What has to be set on the instance so that ranks do not wait for each other in forward."""
    module = site.module
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    if isinstance(module, SynchronizedBatchNorm):
        return {"sync": False}
    if isinstance(module, nn.SyncBatchNorm):
        return {"forward": _LocalForward(module, site.state.tail)}
    return {}


class _LocalForward:
    """The forward of a SyncBatchNorm without synchronisation."""

    def __init__(self, module: nn.SyncBatchNorm, tail: tuple[str, ...]) -> None:
        self.module, self.tail = module, tail

    def __call__(self, input: Tensor) -> Tensor:
        y = _BatchNorm.forward(self.module, input)
        for name in self.tail:
            y = getattr(self.module, name)(y)
        return y
