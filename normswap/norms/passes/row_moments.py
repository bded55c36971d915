"""Mean and variance of rows on the processor, in the fewest passes that are precise enough.

The first way is off by more, the more deviations a row's mean is from zero, and so is the second,
which takes longer. Each therefore measures what is too far for it again in the next way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from normswap.norms.passes.native import batch_norm_sums
from normswap.norms.passes.plain import two_pass
from normswap.norms.passes.shapes import work_dtype

__all__ = ["row_moments"]

#: How many deviations from zero a mean may be. Up to there variances are off by 1e-6 in either way,
#: or a few times as much by sums where all values but a few are the same.
NEAR, FAR = 2, 10

#: How many terms a plain sum in float32 may have, and how few are no gain any more.
TERMS = range(16, 513)


def row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every row, of `work_dtype`.

    Args:
        rows: (R, L), contiguous, with L at least 1.
    """
    parts = _parts(rows.shape[1]) if rows.dtype == torch.float32 else 0
    return _by_sums(rows, parts) if parts else _by_group_norm(rows)


@functools.lru_cache
def _parts(length: int) -> int:
    """Into how many equal parts a row is cut for its sums, or 0 where there is no good number."""
    least = -(-length // TERMS[-1])
    return next((n for n in range(least, length // TERMS[0] + 1) if length % n == 0), 0)


def _by_sums(rows: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """From Σ x and Σ x·(x - pivot), in a single pass that writes nothing.

    The pivot is one of a row's own values, so that little of the second sum is to be taken off.
    """
    count, length = rows.shape
    pivot = rows[:, length // 2].contiguous()
    cut = rows.view(1, count * parts, length // parts)
    sums = batch_norm_sums(cut, cut, pivot[:, None].expand(count, parts).reshape(-1))
    square, mean = (each.view(count, parts).sum(1).div_(length) for each in sums)
    away = mean - pivot
    var = square.addcmul_(mean, away, value=-1)
    # A quarter, as a value is as good a pivot as any up to twice as many deviations from the mean.
    squared = mean.square().addcmul_(away, away, value=0.25)
    return _beyond(NEAR, squared, rows, mean, var, _by_group_norm)


def _by_group_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm with a group for each row tells mean and 1/deviation.

    With eps 0 the deviation of a constant row is infinite, which is right here, as its output
    is not used.
    """
    count, length = rows.shape
    one = None if rows.dtype == work_dtype(rows) else rows.new_ones(count, dtype=torch.float32)
    _, mean, rstd = torch.native_group_norm(
        rows.view(1, count, length), one, one, 1, count, length, count, 0.0
    )
    mean, var = mean.view(-1), rstd.view(-1).reciprocal_().square_()
    return _beyond(FAR, mean.square(), rows, mean, var, _by_two_passes)


def _by_two_passes(rows: Tensor) -> tuple[Tensor, Tensor]:
    return two_pass(rows.to(work_dtype(rows)), 1)


def _beyond(
    deviations: float,
    squared: Tensor,
    rows: Tensor,
    mean: Tensor,
    var: Tensor,
    measure: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Mean and variance, of rows that are too far from zero in another way.

    Args:
        deviations: how far they may be.
        squared: how far they are, squared.
        rows: (R, L).
        mean: (R,), as is what follows.
        var: which is not that of rows that are too far.
        measure: the other way.
    """
    far = (squared > deviations**2 * var).nonzero().squeeze(1)
    if 4 * len(far) > len(rows):  # gathering so many takes longer than measuring all
        return measure(rows)
    if len(far):
        mean[far], var[far] = measure(rows[far])
    return mean, var
