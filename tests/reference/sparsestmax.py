"""Sparsestmax as its paper draws it: out from the centre of a face to a sphere, and in again."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def sparsestmax(logits: Tensor, radius: float) -> Tensor:
    """Shao et al. 2019, for a vector (K,): step by step, with a branch at each."""
    squared, centre, first = radius**2, None, True
    while True:
        point = nearest(logits)
        if int((point > 0).sum()) == 1:
            return point
        inside = (point > 0).to(point)
        middle = inside / inside.sum()
        if not first and centre is not None:
            squared = max(squared - float(((middle - centre) ** 2).sum()), 0.0)
        first, centre = False, middle
        distance = ((point - middle) ** 2).sum() ** 0.5
        if distance < 1e-7 or distance >= squared**0.5:
            return point
        outside = middle + squared**0.5 * (point - middle) / distance
        if (outside >= 0).all():
            return outside
        logits = outside


def nearest(point: Tensor) -> Tensor:
    """The nearest point of the simplex: of every face's plane, the nearest that is a share."""
    best = None
    size = len(point)
    for count in range(1, size + 1):
        for corners in itertools.combinations(range(size), count):
            at = list(corners)
            on = torch.zeros_like(point)
            on[at] = point[at] - (point[at].sum() - 1) / count
            if (on >= 0).all():
                far = float(((on - point) ** 2).sum().detach())
                if best is None or far < best[0]:
                    best = far, on
    assert best is not None
    return best[1]
