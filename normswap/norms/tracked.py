"""Norms that pool over the batch and keep running statistics in terms of their own.

A mean and a variance do not say what such a norm needs in eval mode, or it keeps them in another
form. It is written in plain torch on the values themselves: `TrackedNorm.standardize` measures,
`TrackedNorm.over_ranks` makes a mean over the batch one over all ranks, and `TrackedNorm.track`
lets what is kept follow. What it keeps is the module's own: a start computes it from the source's
running statistics, and a reader computes from it what they would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normswap.norms.affine import AffineNorm, described
from normswap.norms.base import place
from normswap.norms.batch import MOMENTUM
from normswap.norms.entry import AFFINE, EPS, Option, flag
from normswap.norms.state import NormState
from normswap.norms.sync import merged, ranks

__all__ = ["OPTIONS", "TrackedNorm", "furnished", "of_source", "precise", "retold"]


class TrackedNorm(AffineNorm):
    """weight · z + bias, where z is by the batch in training, by what was kept of many in eval.

    Args:
        num_features: C.
        eps: what keeps from dividing by zero. Default 1e-5.
        momentum: weight of the newest batch in what is kept; ``None`` for the plain average of
            all. Default 0.1.
        sync: whether the batch is that of all ranks.
        process_group: the ranks that share it; ``None`` for all.
        dim: as for `AffineNorm`.

    Attributes:
        running_mean: (C,).
        num_batches_tracked: a long scalar.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        sync: bool = False,
        process_group: Any = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, dim)
        self.momentum = momentum
        self.sync = sync
        self.process_group = process_group
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    @property
    def pools_ranks(self) -> bool:
        """Whether the batch is that of several ranks."""
        return self.sync and self.training and ranks(self.process_group) > 1

    def over_ranks(self, mean: Tensor, count: int) -> Tensor:
        """The mean over all ranks' values of which ``mean`` is this one's, if they are pooled.

        Gradients are those of one process on all values, of which a rank may have none.

        Args:
            mean: of this rank's values, of any shape.
            count: how many values each was taken of.

        Raises:
            DegeneratePooling: there is a single value.
        """
        if self.pools_ranks:
            name = self.site_path or type(self).__name__
            flat = mean.reshape(-1)
            none = torch.zeros_like(flat)
            whole, _, _ = merged(count, flat, none, group=self.process_group, name=name)
            return whole.to(mean.dtype).view(mean.shape)
        self.refuse_single_value(count, "use a larger batch")
        return mean

    @torch.no_grad()
    def track(self, **measured: Tensor) -> None:
        """Count the batch, and let what is kept under these names follow what was measured."""
        self.num_batches_tracked.add_(1)
        weight: float | Tensor | None = self.momentum
        if weight is None:
            weight = self.num_batches_tracked.double().reciprocal()
        for name, new in measured.items():
            kept = self.get_buffer(name)
            share = weight.to(new.dtype) if isinstance(weight, Tensor) else weight
            kept.copy_(torch.lerp(kept.to(new.dtype), new, share))

    def extra_repr(self) -> str:
        """Say size, eps and momentum, as torch's BatchNorm does."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


#: The options that all of them have.
OPTIONS = (
    flag("sync", False, "pool the batch over all ranks; DDP takes it on CPU too"),
    Option("process_group", None, "the ranks that share statistics; None: all"),
    EPS,
    MOMENTUM,
    AFFINE,
)


def furnished(
    module: TrackedNorm,
    state: NormState,
    *,
    sync: bool,
    process_group: Any,
    eps: float | None,
    momentum: float | None,
) -> TrackedNorm:
    """Give a new norm the settings that all of them have, and the source's precision."""
    module.eps = state.eps if eps is None else eps
    module.momentum = state.momentum if momentum is None else momentum
    module.sync, module.process_group, module.dim = sync, process_group, state.dim
    place(module.to(state.reference()), state)
    return module


def precise(tensor: Tensor) -> Tensor:
    """A tensor's values in float64, where the device has it."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def of_source(state: NormState) -> tuple[Tensor, dict[str, Tensor]]:
    """A source's running variance in float64, and copies of what all of them take as it is."""
    mean, var, count = state.running_mean, state.running_var, state.num_batches_tracked
    if mean is None or var is None:
        raise ValueError("the source keeps no running statistics")
    taken = {"running_mean": mean.detach().clone()}
    if count is not None:
        taken["num_batches_tracked"] = count.detach().clone()
    return precise(var), taken


def retold(module: TrackedNorm, running_var: Tensor) -> dict[str, Any]:
    """What a reader says of any of them: `NormState`'s fields but name, kind, rule, settings.

    Args:
        module: the norm.
        running_var: the variance by which a batch norm would evaluate as it does.
    """
    return {
        **described(module),
        "momentum": module.momentum,
        "running_var": running_var.to(module.running_mean.dtype),
        "retold": True,
    }
