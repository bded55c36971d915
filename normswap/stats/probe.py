"""Standing at a norm while it computes: scratch buffers instead of the model's, and two hooks.

The buffers that a probed norm reads and writes are scratch, in single precision at least: the
model's own are touched only when all is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.site import NormSite
from normswap.norms.functional import own_for_a_while, refer_again, referred

__all__ = ["Probe", "input_of", "probing"]

_SCRATCH = ("running_mean", "running_var", "num_batches_tracked")


class Probe(ABC):
    """Stands at one norm that keeps running statistics.

    Args:
        site: where the norm is.
    """

    def __init__(self, site: NormSite) -> None:
        self.site = site
        self.module: Any = site.module
        names = referred(self.module).keys() & set(_SCRATCH)
        self._of_owner = {name: vars(self.module)[name] for name in names}
        self._refers: dict[str, str] = {}
        self._buffers = dict(self.module._buffers)
        self._parameters = dict(self.module._parameters)
        self._handles: list[Any] = []
        self._set: dict[str, Any] = {}
        self._shadowed: dict[str, Any] = {}

    @abstractmethod
    def before(self, x: Tensor) -> None:
        """What happens when the norm is about to be called."""

    def after(self, x: Tensor) -> None:  # noqa: B027  # not every probe has more to do
        """What happens when the norm has been called; its input may have been overwritten."""

    def attributes(self) -> dict[str, Any]:
        """What has to be set on the norm for as long as it is probed."""
        return {}

    @property
    def scratch(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance, (C,) each, that the norm has meanwhile."""
        return self.module._buffers["running_mean"], self.module._buffers["running_var"]

    def lend(self, mean: Tensor, var: Tensor) -> None:
        """Let the norm have a running mean and variance, (C,) each, in scratch's precision.

        They take the place of those before, which a gradient may still ask for.
        """
        for name, old, new in zip(_SCRATCH, self.scratch, (mean, var), strict=False):
            self.module._buffers[name] = new.to(old)

    def attach(self) -> None:
        """Lend the norm its scratch buffers and hook into its calls."""
        module = self.module
        self._refers = own_for_a_while(module, _SCRATCH)
        self._buffers = dict(module._buffers)
        told = self.site.state
        lent = (told.running_mean, told.running_var) if told.retold else ()
        shared = self._buffers | dict(zip(_SCRATCH, lent, strict=False))
        for name in _SCRATCH:
            own = shared.get(name)
            if own is not None:
                dtype = torch.promote_types(own.dtype, torch.float32)
                scratch = own.to(dtype) if own.is_floating_point() else own
                module._buffers[name] = scratch.clone()
        for name, own in self._parameters.items():
            if own is not None and own.dtype in (torch.float16, torch.bfloat16):
                module._parameters[name] = nn.Parameter(own.detach().float(), requires_grad=False)
        wanted = self.attributes()
        self._shadowed = {k: vars(module)[k] for k in wanted if k in vars(module)}
        self._set = wanted  # only now, lest an interrupt leave `detach` without what it puts back
        vars(module).update(wanted)
        self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def detach(self) -> None:
        """Leave the norm as it was."""
        for handle in self._handles:
            handle.remove()
        self.module._buffers.update(self._buffers)
        self.module._parameters.update(self._parameters)
        refer_again(self.module, self._refers, self._of_owner)
        for name in self._set.keys() - self._shadowed.keys():
            vars(self.module).pop(name, None)
        vars(self.module).update(self._shadowed)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.before(input_of(args, kwargs))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.after(input_of(args, kwargs))


@contextmanager
def probing(probes: Sequence[Probe]) -> Iterator[None]:
    """Stand at norms within the block.

    On leaving, also by an exception, each norm has its own buffers, parameters and attributes
    again, untouched.
    """
    with ExitStack() as leaving:  # which detaches all the others where one is interrupted
        for probe in probes:
            leaving.callback(probe.detach)
            probe.attach()
        yield


def input_of(args: Any, kwargs: Any) -> Tensor:
    """What a norm is called with, of a hook's arguments."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
