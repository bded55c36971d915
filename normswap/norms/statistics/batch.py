"""BatchNorm of 1, 2 and 3 dimensions, optionally synchronised over ranks on any backend.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015, arXiv 1502.03167.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import CannotConvert
from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, BATCH_SOURCES, EPS, MOMENTUM, SYNC, NormEntry, flag
from normswap.norms.reading import dimension, layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState, batch_rule
from normswap.norms.sync import ranks, synchronized_batch_norm

__all__ = [
    "ENTRIES",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SynchronizedBatchNorm",
    "read_batch_norm",
]


class SynchronizedBatchNorm(Norm):
    """Mixed in before a torch BatchNorm: pools over all ranks when ``sync`` is set.

    Attributes:
        sync: whether training statistics are pooled over the ranks of ``process_group``.
        process_group: the ranks that share statistics; ``None`` for all.
    """

    sync: bool = False
    process_group: Any = None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: nn.Parameter  # or None, as torch has it
    bias: nn.Parameter
    momentum: float | None
    eps: float
    track_running_stats: bool

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) by its batch in training, by running statistics in eval."""
        if not (self.sync and self.training and ranks(self.process_group) > 1):
            if self.training or self.running_mean is None:
                values = x.numel() // max(x.shape[1], 1)
                self.refuse_single_value(values, "use a larger batch")
            return super().normalize(x)
        self._check_input_dim(x)
        tracked = self.track_running_stats
        return synchronized_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            factor=self._count_batch(),
            eps=self.eps,
            group=self.process_group,
            name=self.site_path or type(self).__name__,
        )

    def _count_batch(self) -> float:
        """Count this batch and return its weight in the running statistics."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            return 1.0 / self.num_batches_tracked.item()
        return self.momentum

    def _check_input_dim(self, x: Tensor) -> None:
        return super()._check_input_dim(x)  # type: ignore[misc,no-any-return]


class BatchNorm1d(SynchronizedBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with normswap's layout, tail and synchronisation."""


class BatchNorm2d(SynchronizedBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with normswap's layout, tail and synchronisation."""


class BatchNorm3d(SynchronizedBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with normswap's layout, tail and synchronisation."""


_PER_GROUP = (SynchronizedBatchNorm, nn.SyncBatchNorm)
_TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_OURS = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}


def read_batch_norm(module: nn.Module, *, norm: str = "bn") -> NormState:
    """Read any `torch.nn.modules.batchnorm._BatchNorm`."""
    held: Any = module
    given = tensors(module)
    tracks = given["running_mean"] is not None
    return NormState(
        norm=norm,
        kind="batch_norm",
        num_features=held.num_features,
        rule=batch_rule(tracks=tracks),
        eps=held.eps,
        momentum=held.momentum,
        dim=dimension(module, *_TORCH.values()),
        settings={
            "sync": held.sync if isinstance(module, SynchronizedBatchNorm) else False,
            "process_group": held.process_group if isinstance(module, _PER_GROUP) else None,
            "eps": held.eps,
            "momentum": held.momentum,
            "affine": given["weight"] is not None,
            "track_running_stats": tracks,
        },
        **given,
        **layout(module),
    )


def start_batch_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    sync: bool = False,
    process_group: Any = None,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
    track_running_stats: bool | None = None,
) -> Start:
    """Start a BatchNorm; exact from any of its relatives."""
    if state.channel_dim == 1 and state.dim not in _TORCH:
        raise CannotConvert(
            "nothing tells how many dimensions its input has", "give example_inputs"
        )
    # Tokens are viewed as (N, C, L) whatever their shape, which is BatchNorm1d's input.
    dim = state.dim if state.channel_dim == 1 and state.dim is not None else 1
    if track_running_stats is None:
        track_running_stats = state.tracks or state.kind != "batch_norm"
    rule = batch_rule(tracks=track_running_stats)
    # Ours says where it stands when a norm that did not pool over the batch before cannot.
    pooled_before = state.kind in ("batch_norm", "")
    plain = pooled_before and not (sync or state.flattens or state.tail) and state.channel_dim == 1

    def shell() -> nn.Module:
        module = (_TORCH if plain else _OURS)[dim](
            state.num_features,
            eps=state.eps if eps is None else eps,
            momentum=state.momentum if momentum is None else momentum,
            affine=False,
            track_running_stats=False,
        )
        if isinstance(module, SynchronizedBatchNorm):
            place(module, state)
            module.sync = sync
            module.process_group = process_group
        return module

    return begin(
        state,
        shell,
        rule,
        carry=carry,
        eps=eps,
        affine=affine,
        running=track_running_stats,
        note=_thaw_note(state),
    )


def _thaw_note(state: NormState) -> str:
    return "trains again: it was frozen" if state.norm == "frozen_bn" else ""


ENTRIES = (
    NormEntry(
        name="bn",
        aliases=("batch_norm", "batchnorm"),
        kind="batch_norm",
        axis="none",
        pooled="N × H·W, per channel",
        paper="Ioffe and Szegedy 2015, arXiv 1502.03167",
        sources=BATCH_SOURCES,
        start=start_batch_norm,
        reads=dict.fromkeys((*_TORCH.values(), *_OURS.values(), _BatchNorm), read_batch_norm),
        options=(
            *SYNC,
            EPS,
            MOMENTUM,
            AFFINE,
            flag("track_running_stats", None, "keep running statistics; None: as the source"),
        ),
        needs=frozenset({"dim"}),
    ),
)
