"""How well statistics are known by now, judged by how much the batches differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.stats.accumulate import Terms

__all__ = ["Convergence", "Point"]

#: With fewer batches than this, how much they differ is itself hardly known.
FEWEST_BATCHES = 5


@dataclass(frozen=True)
class Point:
    """How well all norms were known after some batches.

    Args:
        samples: samples read until then.
        mean_error: the largest, over the norms, standard error of the mean, in standard
            deviations: root mean square over the norm's channels.
        var_error: the largest standard error of the variance, relative to it, likewise.
        worst: path of the norm that is known least well.
    """

    samples: int
    mean_error: float
    var_error: float
    worst: str

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.mean_error, self.var_error)


class Convergence:
    """Follows the standard errors of every norm's mean and variance.

    The statistics are weighted averages of what the batches contribute, and batches are taken to
    be independent: the standard error of an average follows from how its terms differ.

    Attributes:
        points: one entry a look.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._norms: dict[str, _Scatter] = {}

    def add(self, path: str, terms: Terms) -> None:
        """Take in what a batch contributes to a norm's statistics."""
        if path not in self._norms:
            self._norms[path] = _Scatter(torch.zeros(2, *terms.mean.shape).to(terms.mean))
        self._norms[path].add(float(terms.weight), torch.stack([terms.mean, terms.var]))

    def look(self, samples: int) -> Point | None:
        """Judge how well all norms are known after so many samples; ``None`` if it is too early."""
        errors = {path: norm.errors() for path, norm in self._norms.items()}
        if not errors or any(error is None for error in errors.values()):
            return None
        known = {path: error for path, error in errors.items() if error is not None}
        worst = max(known, key=lambda path: max(known[path]))
        mean_error, var_error = (max(error[i] for error in known.values()) for i in (0, 1))
        self.points.append(Point(samples, mean_error, var_error, worst))
        return self.points[-1]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All there is to remember: tensors by name, and what JSON can hold."""
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, Any] = {}
        for path, norm in self._norms.items():
            tensors |= {f"{path}.centre": norm.centre, f"{path}.spread": norm.spread}
            sizes[path] = (norm.batches, norm.weight, norm.squares)
        return tensors, {"norms": sizes, "points": [asdict(point) for point in self.points]}

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Be as `state` was."""
        self.points = [Point(**point) for point in notes["points"]]
        for path, sizes in notes["norms"].items():
            norm = self._norms[path] = _Scatter(tensors[f"{path}.centre"])
            norm.spread = tensors[f"{path}.spread"]
            norm.batches, norm.weight, norm.squares = sizes


class _Scatter:
    """How the terms of two weighted averages, (2, C) in all, differ (West 1979)."""

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        self.spread = torch.zeros_like(centre)
        self.batches, self.weight, self.squares = 0, 0.0, 0.0

    def add(self, weight: float, terms: Tensor) -> None:
        if weight == 0:
            return
        self.batches += 1
        self.weight += weight
        self.squares += weight**2
        delta = terms - self.centre
        self.centre = self.centre + delta * (weight / self.weight)
        self.spread = self.spread + delta * (terms - self.centre) * weight

    def errors(self) -> tuple[float, float] | None:
        """Standard errors of mean, in standard deviations, and of variance, relative to it."""
        if self.batches < FEWEST_BATCHES:
            return None
        effective = self.weight**2 / self.squares
        squared = self.spread / (self.weight * (effective - 1))
        var = self.centre[1]
        scale = torch.stack([var, var.square()])
        # A channel that is constant is known as soon as it is seen.
        relative = torch.where(scale > 0, squared / scale, torch.zeros_like(scale))
        mean_error, var_error = relative.mean(1).sqrt().tolist()
        return (mean_error, var_error) if math.isfinite(mean_error + var_error) else None
