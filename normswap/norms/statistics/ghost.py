"""Ghost batch normalization: parts of the batch are normalized each by itself.

Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in
large batch training of neural networks", NIPS 2017, arXiv 1705.08741.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import whole
from normswap.norms.measured import MeasuredNorm, pooled
from normswap.norms.pool import RUNNING, Pool, Rule

__all__ = ["ENTRIES", "GhostBatchNorm"]

GROUP_SIZE = 32


class GhostBatchNorm(MeasuredNorm):
    """Batch normalization of ceil(N / group_size) consecutive parts of the batch.

    The running statistics follow the mean over the parts of their means and unbiased variances:
    one step a batch, whatever the number of parts. In eval mode it is batch normalization. A last
    part that has a single value for each channel joins the one before it.

    Args:
        num_features: C.
        group_size: the most samples in a part; all parts have as many, but for the last. Default
            32.
        **rest: as for `MeasuredNorm`.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel.
    """

    synchronizes = False

    def __init__(self, num_features: int, *, group_size: int = GROUP_SIZE, **rest: Any) -> None:
        super().__init__(num_features, **rest)
        self.group_size = group_size

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...), in eval mode as batch normalization."""
        if self.training or self.running_mean is None:
            return super().normalize(x)
        held = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *held, training=False, eps=self.eps)

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize each part by its own statistics, in eval mode all by the running ones."""
        if not self.training and self.running_mean is not None:
            return self.standardized(*self.over_batch(mean, var, positions))
        sizes = self.part_sizes(len(mean), positions)
        if not sizes:
            return self.standardized(mean, var)
        centre, spread = self._of_parts(mean, var, sizes)
        if self.training:
            self._track(*self._to_keep(mean, var, centre, spread, [n * positions for n in sizes]))
        counts = torch.tensor(sizes, device=mean.device)
        gain, offset = self.standardized(centre, spread)
        gain, offset = (
            each.repeat_interleave(counts, 0, output_size=sum(sizes)) for each in (gain, offset)
        )
        return gain, offset

    def _of_parts(self, mean: Tensor, var: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance of each part, (parts, C): parts of the same size at once."""
        runs = [(len(list(alike)), size) for size, alike in itertools.groupby(sizes)]
        means, variances = (
            torch.split(each, [count * size for count, size in runs]) for each in (mean, var)
        )
        found = [
            pooled(torch.unflatten(m, 0, run), torch.unflatten(v, 0, run), 1)
            for run, m, v in zip(runs, means, variances, strict=True)
        ]
        centre, spread = (torch.cat(each).squeeze(1) for each in zip(*found, strict=True))
        return centre, spread

    def part_sizes(self, samples: int, positions: int) -> list[int]:
        """How many samples each part has."""
        if samples == 0:
            return []
        self.refuse_single_value(samples * positions, "use a larger batch")
        size = math.ceil(samples / math.ceil(samples / self.group_size))
        sizes = [min(size, samples - first) for first in range(0, samples, size)]
        if len(sizes) > 1 and sizes[-1] * positions == 1:
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        self.refuse_single_value(min(sizes) * positions, "use a larger group_size")
        return sizes

    def _to_keep(
        self, mean: Tensor, var: Tensor, centre: Tensor, spread: Tensor, values: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Mean over the parts of means and unbiased variances; or of the batch, for a pass."""
        if self.plain_statistics:
            centre, spread = (each[None] for each in pooled(mean, var, 0))
            values = [sum(values)]
        unbiased = spread.new_tensor([n / (n - 1) for n in values]).unsqueeze(1)
        return centre.mean(0), (spread * unbiased).mean(0)

    def pools(self, *, tracks: bool) -> Rule:
        """Parts of the batch."""
        part = Pool("batch", samples=self.group_size)
        return Rule(part, RUNNING if tracks else part)


ENTRIES = (
    declared(
        GhostBatchNorm,
        name="ghost_bn",
        aliases=("ghost_batch_norm", "ghostbn"),
        kind="batch_norm",
        axis="statistics",
        pooled="group_size samples × H·W, per channel",
        paper="Hoffer et al. 2017, arXiv 1705.08741",
        options=(whole("group_size", GROUP_SIZE, "the most samples in a part"),),
    ),
)
