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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import Option, whole
from normswap.norms.grouped import GroupedNorm
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.precision import precise
from normswap.norms.state import NormState
from normswap.norms.tracked import TrackedNorm

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


class IterativeNorm(GroupedNorm, TrackedNorm):
    """weight · W (x - μ) + bias, where W nearly whitens each group of consecutive channels.

    Args:
        num_features: C.
        num_groups: how many groups; by default so few that none has more than 64 channels.
        iterations: steps of Newton's iteration, at most 10. Default 5.
        **rest: as for `TrackedNorm`; eps is added to the diagonal of the covariance.

    Attributes:
        running_mean: (C,).
        running_wm: (groups, C / groups, C / groups), the mean of W; starts as the identity.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    own = ("running_wm",)
    absorbs_eps = True
    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        iterations: int = ITERATIONS,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.iterations = iterations
        self.register_buffer("running_mean", torch.zeros(num_features))
        identity = torch.eye(self.channels_per_group)
        self.register_buffer("running_wm", identity.repeat(self.num_groups, 1, 1))

    def standardize(self, x: Tensor) -> Tensor:
        """Whiten by the batch, or by what was kept."""
        rows = x.movedim(1, 0).reshape(self.num_groups, self.channels_per_group, -1)
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

    @staticmethod
    def default_groups(num_features: int) -> int:
        """So few groups that none has more than 64 channels."""
        fitting = (g for g in range(1, num_features + 1) if num_features % g == 0)
        return next(g for g in fitting if num_features // g <= MOST_CHANNELS)

    @property
    def _is_diagonal(self) -> bool:
        """Whether what was kept whitens nothing yet, and divides channel by channel."""
        kept = self.running_wm
        return kept.is_meta or torch.equal(kept, torch.diag_embed(kept.diagonal(dim1=1, dim2=2)))

    def pools(self, *, tracks: bool) -> Rule:
        """The batch; in eval mode what was kept, a batch norm's as long as that is diagonal."""
        channels = self.channels_per_group
        train = _Whitening("batch", channels=channels, iterations=self.iterations)
        return Rule(train, RUNNING if self._is_diagonal else _Whitening(channels=channels))

    def terms(self, mean: Tensor, var: Tensor, eps: float) -> dict[str, Tensor]:
        """The diagonal matrices that divide as running variances do."""
        slope = (var + eps).rsqrt().view(self.num_groups, -1)
        return {"running_mean": mean, "running_wm": torch.diag_embed(slope)}

    def retold(self) -> dict[str, Tensor]:
        """The variance of what the matrices make white."""
        whitening = precise(self.running_wm)
        if self._is_diagonal:
            var = whitening.diagonal(dim1=1, dim2=2).square().reciprocal()
        else:
            inverse = torch.linalg.inv_ex(whitening).inverse
            var = torch.bmm(inverse, inverse.mT).diagonal(dim1=1, dim2=2)
        return {"running_var": (var.reshape(-1) - self.eps).to(self.running_wm.dtype)}

    def note(self, state: NormState) -> str:
        """Say the groups."""
        return f"{self.num_groups} groups of {self.channels_per_group}"

    def extra_repr(self) -> str:
        """Say its groups too."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


ENTRIES = (
    declared(
        IterativeNorm,
        name="iter_norm",
        aliases=("iterative_normalization", "iternorm"),
        kind="iter_norm",
        axis="standardization",
        pooled="N × H·W, the covariance of a group of channels",
        paper="Huang et al. 2019, arXiv 1904.03441",
        options=(
            Option("num_groups", None, "None: so few that none has more than 64 channels"),
            Option("channels_per_group", None, "instead of num_groups"),
            whole("iterations", None, "Newton's steps; None: 5", high=MOST_ITERATIONS),
        ),
    ),
)
