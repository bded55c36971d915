"""SyncBatchNorm: torch's own, made to work on CPU ranks too.

Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018, arXiv 1711.07240.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.norms.base import place
from normswap.norms.entry import AFFINE, BATCH_SOURCES, EPS, MOMENTUM, NormEntry, Option
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState, batch_rule
from normswap.norms.statistics.batch import SynchronizedBatchNorm, read_batch_norm
from normswap.norms.sync import ranks

__all__ = ["ENTRIES", "SyncBatchNorm"]


class SyncBatchNorm(SynchronizedBatchNorm, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also runs on CPU ranks, with uneven and with empty batches.

    On a GPU it is torch's. On the CPU torch raises as soon as a process group exists; here the
    statistics are pooled through the group (gloo). Without a process group it is a BatchNorm,
    as torch's is. `DistributedDataParallel` refuses any `torch.nn.SyncBatchNorm` on CPU modules:
    convert with ``to="bn", sync=True`` there.

    Args:
        dim: how many dimensions follow the channels, kept for a conversion back; ``None`` if
            unknown. The input may have any number, as in torch.
    """

    dim: int | None = None
    sync = True

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...), N = 0 allowed on some ranks."""
        if x.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, x)
        if self.sync and self.training and ranks(self.process_group) > 1:
            return super().normalize(x)
        return _BatchNorm.forward(self, x)


def start_sync_batch_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    process_group: Any = None,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a SyncBatchNorm; exact from any BatchNorm in one process."""
    running = state.tracks or state.kind != "batch_norm"

    def shell() -> nn.Module:
        module = SyncBatchNorm(
            state.num_features,
            eps=state.eps if eps is None else eps,
            momentum=state.momentum if momentum is None else momentum,
            affine=False,
            track_running_stats=False,
            process_group=process_group,
        )
        module.dim = state.dim
        return place(module, state)

    return begin(
        state,
        shell,
        batch_rule(tracks=running),
        carry=carry,
        eps=eps,
        affine=affine,
        running=running,
    )


def read_sync_batch_norm(module: nn.Module) -> NormState:
    """Read torch's SyncBatchNorm or ours, which remembers the dimension it came from."""
    state = read_batch_norm(module, norm="sync_bn")
    return replace(state, dim=module.dim if isinstance(module, SyncBatchNorm) else None)


ENTRIES = (
    NormEntry(
        name="sync_bn",
        aliases=("sync_batch_norm", "syncbn", "sync_batchnorm"),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W of all ranks, per channel",
        paper="Peng et al. 2018, arXiv 1711.07240",
        sources=BATCH_SOURCES,
        start=start_sync_batch_norm,
        reads={nn.SyncBatchNorm: read_sync_batch_norm, SyncBatchNorm: read_sync_batch_norm},
        options=(
            Option("process_group", None, "the ranks that share statistics; None: all"),
            EPS,
            MOMENTUM,
            AFFINE,
        ),
    ),
)
