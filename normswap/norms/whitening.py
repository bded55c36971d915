"""Iterative normalization: whitens groups of channels by the batch, with Newton's iteration.

Huang, Zhou, Zhu, Liu and Shao, "Iterative Normalization: Beyond Standardization towards Efficient
Whitening", CVPR 2019, arXiv 1904.03441; after Huang, Yang, Lang and Deng, "Decorrelated Batch
Normalization", CVPR 2018, arXiv 1804.08450.

Of a group's covariance Σ, with eps on its diagonal, five steps P ← (3 P - P³ Σ / tr Σ) / 2 from
P = 1 come near to the inverse square root of Σ / tr Σ: large eigenvalues are whitened, small ones
only grow, which is what keeps the noise of small batches down. In eval mode the mean of those
matrices is used, as in the authors' code. A start makes it diagonal, so that it evaluates as what
it replaces; the first step of training then whitens, which is another function. More values than
channels in a group should meet in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.batch import BATCH_SOURCES
from normswap.norms.entry import NormEntry, Option
from normswap.norms.group import chosen_groups
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState
from normswap.norms.tracked import OPTIONS, TrackedNorm, furnished, of_source, precise, retold

__all__ = ["ENTRIES", "IterativeNorm"]

ITERATIONS = 5
MOST_CHANNELS = 64
#: The iteration lets rounding errors grow once it has converged: thirty steps give no numbers.
MOST_ITERATIONS = 10


@dataclass(frozen=True)
class _Whitening(Pool):
    """The covariance of groups of channels, over the batch or as it was kept."""

    over: Over = "whitening"
    iterations: int = ITERATIONS


class IterativeNorm(TrackedNorm):
    """weight · W (x - μ) + bias, where W nearly whitens each group of consecutive channels.

    Args:
        num_features: C.
        num_groups: how many groups. Default 1.
        iterations: steps of Newton's iteration, at most 10. Default 5.
        **rest: as for `TrackedNorm`; eps is added to the diagonal of the covariance.

    Attributes:
        running_wm: (groups, C / groups, C / groups), the mean of W; starts as the identity.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_wm",)
    running_wm: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 1,
        iterations: int = ITERATIONS,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.num_groups = num_groups
        self.iterations = iterations
        identity = torch.eye(num_features // num_groups)
        self.register_buffer("running_wm", identity.repeat(num_groups, 1, 1))

    def standardize(self, x: Tensor) -> Tensor:
        """Whiten by the batch, or by what was kept."""
        rows = x.movedim(1, 0).reshape(self.num_groups, self.num_features // self.num_groups, -1)
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                centred, whitening = self._measured(rows)
            else:
                centred = rows - self.running_mean.to(x.dtype).view(*rows.shape[:2], 1)
                whitening = self.running_wm.to(x.dtype)
            white = torch.bmm(whitening, centred)
        moved = white.reshape(x.movedim(1, 0).shape).movedim(0, 1)
        return torch.empty_like(x).copy_(moved)  # in the input's memory format

    def _measured(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The centred rows and the matrix that whitens them; what is kept follows."""
        count = rows.shape[2]
        divisor = max(count, 1)
        centre = self.over_ranks(rows.sum(2, keepdim=True) / divisor, count)
        centred = rows - centre
        covariance = self.over_ranks(torch.bmm(centred, centred.mT) / divisor, count)
        whitening = self._inverse_root(covariance)
        if count or self.pools_ranks:
            self.track(running_mean=centre.reshape(-1), running_wm=whitening)
        return centred, whitening

    def _inverse_root(self, covariance: Tensor) -> Tensor:
        """About the inverse square root of every group's covariance with eps on its diagonal."""
        identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        regular = covariance + self.eps * identity
        trace = regular.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        normed = regular / trace
        root = identity.expand_as(normed)
        for _ in range(self.iterations):
            cube = torch.bmm(torch.bmm(root, root), root)
            root = 1.5 * root - 0.5 * torch.bmm(cube, normed)
        return root * trace.rsqrt()

    def extra_repr(self) -> str:
        """Say its groups too."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


def _most_groups(num_features: int) -> int:
    """So few groups that none has more than 64 channels."""
    fitting = (g for g in range(1, num_features + 1) if num_features % g == 0)
    return next(g for g in fitting if num_features // g <= MOST_CHANNELS)


def start_iterative_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    iterations: int | None = None,
    sync: bool = False,
    process_group: Any = None,
    eps: float | None = None,
    momentum: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start an IterativeNorm, which evaluates as what evaluated by running statistics did."""
    size, steps = state.num_features, ITERATIONS if iterations is None else iterations
    default: Callable[[int], int] = _most_groups
    groups = chosen_groups(size, num_groups, channels_per_group, default=default)

    def shell() -> nn.Module:
        return furnished(
            IterativeNorm(size, num_groups=groups, iterations=steps),
            state,
            sync=sync,
            process_group=process_group,
            eps=eps,
            momentum=momentum,
        )

    train = _Whitening("batch", channels=size // groups, iterations=steps)
    return begin(
        state,
        shell,
        Rule(train, RUNNING),
        carry=carry,
        affine=affine,
        note=f"{groups} groups of {size // groups}",
        kept=partial(_kept, state, groups),
    )


def _kept(state: NormState, groups: int) -> dict[str, Tensor]:
    """The diagonal matrices that divide as running variances do."""
    var, taken = of_source(state)
    slope = (var + state.eps).rsqrt().view(groups, -1)
    return {**taken, "running_wm": torch.diag_embed(slope).to(taken["running_mean"].dtype)}


def read_iterative_norm(module: nn.Module) -> NormState:
    """Read an IterativeNorm; as long as it has not learned to whiten it is a batch norm in eval."""
    if not isinstance(module, IterativeNorm):
        raise TypeError(f"expected an IterativeNorm, got {type(module).__name__}")
    channels = module.num_features // module.num_groups
    whitening = precise(module.running_wm)
    slopes = whitening.diagonal(dim1=1, dim2=2)
    if whitening.is_meta or torch.equal(whitening, torch.diag_embed(slopes)):
        evaluated, var = RUNNING, slopes.square().reciprocal()
    else:
        inverse = torch.linalg.inv_ex(whitening).inverse
        evaluated = _Whitening(channels=channels)
        var = torch.bmm(inverse, inverse.mT).diagonal(dim1=1, dim2=2)
    train = _Whitening("batch", channels=channels, iterations=module.iterations)
    return NormState(
        norm="iter_norm",
        kind="iter_norm",
        rule=Rule(train, evaluated),
        settings={
            "num_groups": module.num_groups,
            "channels_per_group": channels,
            "iterations": module.iterations,
            "sync": module.sync,
            "process_group": module.process_group,
            "eps": module.eps,
            "momentum": module.momentum,
            "affine": module.weight is not None,
        },
        **retold(module, var.reshape(-1) - module.eps),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_ITERATIONS


ENTRIES = (
    NormEntry(
        name="iter_norm",
        aliases=("iterative_normalization", "iternorm"),
        kind="iter_norm",
        axis="standardization",
        pooled="N × H·W, the covariance of a group of channels",
        paper="Huang et al. 2019, arXiv 1904.03441",
        sources=BATCH_SOURCES,
        start=start_iterative_norm,
        reads={IterativeNorm: read_iterative_norm},
        options=(
            Option("num_groups", None, "None: so few that none has more than 64 channels"),
            Option("channels_per_group", None, "instead of num_groups"),
            Option("iterations", None, "Newton's steps; None: 5", "1 to 10", _is_count),
            *OPTIONS,
        ),
    ),
)
