"""How well statistics are known by now, on the way of a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from normswap.stats.abreast import Abreast
from normswap.stats.scatter import Scatter

__all__ = ["Convergence", "Point"]


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

    Args:
        rows: the norms, none for a method that reads everything before it knows anything.

    Attributes:
        points: one entry a look.
    """

    def __init__(self, rows: Sequence[Abreast] = ()) -> None:
        self.points: list[Point] = []
        self._rows = rows

    def within(self, tol: float) -> bool:
        """Whether all norms were known to a tolerance at the last look."""
        return bool(self.points) and self.points[-1].error <= tol

    def look(self, samples: int) -> None:
        """Judge how well all norms are known after so many samples, unless it is too early."""
        if self.points and self.points[-1].samples == samples:
            return
        errors = {path: error for row in self._rows for path, error in row.errors().items()}
        if not errors or not all(map(math.isfinite, chain.from_iterable(errors.values()))):
            return
        worst = max(errors, key=lambda path: max(errors[path]))
        mean_error, var_error = map(max, zip(*errors.values(), strict=True))
        self.points.append(Point(samples, mean_error, var_error, worst))

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """All there is to remember: tensors by name, and what JSON can hold."""
        tensors = {
            f"{index}.{name}": tensor
            for index, row in enumerate(self._rows)
            for name, tensor in row.scatter.state().items()
        }
        return tensors, [asdict(point) for point in self.points]

    def restore(self, tensors: Mapping[str, Tensor], points: list[dict[str, Any]]) -> None:
        """Be as `state` was."""
        self.points = [Point(**point) for point in points]
        for index, row in enumerate(self._rows):
            row.scatter.restore({name: tensors[f"{index}.{name}"] for name in Scatter.NAMES})
