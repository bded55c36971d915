"""How far statistics of batches may be off, from the data themselves.

A statistic that is a ratio of sums over batches, Σ y / Σ w, is off by about the square root of
n / (n - 1) · Σ (y - ratio · w)² / (Σ w)², when batches are drawn independently: Cochran,
"Sampling Techniques", 1977, section 6.4, for clusters of different sizes. n is how many batches
there are in effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def effective(weights: Sequence[float]) -> float:
    """How many batches of one weight are worth as much: Kish 1965."""
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def of_pooled(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Standard errors of the mean in deviations and of the variance relative to it, (C,) each.

    Of all values of batches (N, C, ...) together. A batch's part of the sum of (x - mean) and of
    (x - mean)² - variance is what it moves them by.
    """
    values = [batch.transpose(0, 1).flatten(1) for batch in batches]
    everything = torch.cat(values, 1)
    mean = everything.mean(1, keepdim=True)
    var = (everything - mean).square().mean(1, keepdim=True)
    moved_mean = [(x - mean).sum(1) for x in values]
    moved_var = [((x - mean).square() - var).sum(1) for x in values]
    weights = [x.shape[1] for x in values]
    return (
        _error(moved_mean, weights) / var.squeeze(1).sqrt(),
        _error(moved_var, weights) / var.squeeze(1),
    )


def of_average(batches: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Likewise of the weighted average of the batches' means and of their variances."""
    values = [batch.transpose(0, 1).flatten(1) for batch in batches]
    means, variances = [x.mean(1) for x in values], [x.var(1) for x in values]
    mean, var = _average(means, weights), _average(variances, weights)
    moved_mean = [weight * (m - mean) for weight, m in zip(weights, means, strict=True)]
    moved_var = [weight * (v - var) for weight, v in zip(weights, variances, strict=True)]
    return _error(moved_mean, weights) / var.sqrt(), _error(moved_var, weights) / var


def _average(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)


def _error(moved: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    count = effective(weights)
    squares = sum(each.square() for each in moved)
    return (squares * count / (count - 1)).sqrt() / sum(weights)
