"""What a statistics pass did to each norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from normswap.stats.convergence import Point
from normswap.table import Listing

__all__ = ["Drift", "WarmupReport", "drift"]


@dataclass(frozen=True)
class Drift:
    """How far one norm's running statistics moved.

    Args:
        path: where the norm is.
        status: ``"estimated"``, or why it was left alone.
        calls: how often it was called, on all ranks.
        mean_shift: root mean square over the channels of the change of the mean, in new standard
            deviations; ``None`` where nothing was estimated.
        var_ratio: geometric mean over the channels of new over old variance, likewise.
    """

    path: str
    status: str
    calls: int = 0
    mean_shift: float | None = None
    var_ratio: float | None = None


class WarmupReport(Listing[Drift]):
    """The outcome of `normswap.warmup`, norm by norm; prints as a table.

    Attributes:
        method: how the statistics were put together.
        batches: batches read on this rank.
        samples: samples read on this rank.
        skipped: batches left out because of values that are not finite.
        seconds: how long it took.
        tol: the tolerance that was asked for.
        convergence: how well the statistics were known on the way, as far as the method tells.
    """

    title = "Warm-up"
    columns = ("path", "status", "calls", "mean moved by (std)", "variance ×")

    def __init__(
        self,
        rows: Iterable[Drift],
        *,
        method: str,
        batches: int,
        samples: int,
        skipped: int,
        seconds: float,
        tol: float | None = None,
        convergence: Sequence[Point] = (),
    ) -> None:
        super().__init__(rows)
        self.method = method
        self.batches = batches
        self.samples = samples
        self.skipped = skipped
        self.seconds = seconds
        self.tol = tol
        self.convergence = tuple(convergence)

    @property
    def estimated(self) -> list[Drift]:
        """The norms whose statistics were written."""
        return [row for row in self if row.status == "estimated"]

    @property
    def left(self) -> list[Drift]:
        """The norms that were left alone, with the reason as their status."""
        return [row for row in self if row.status != "estimated"]

    def summary(self) -> str:
        """How many norms from how much data, and how long it took."""
        skipped = f", {self.skipped} batches skipped" if self.skipped else ""
        return (
            f"{self.method}: {len(self.estimated)} of {len(self)} norms from {self.samples} "
            f"samples in {self.batches} batches{skipped}, {self.seconds:.1f} s"
        )

    def cells(self, item: Drift) -> tuple[object, ...]:
        """One norm as a row."""
        return (
            item.path or "(the model itself)",
            item.status,
            item.calls or "",
            "" if item.mean_shift is None else f"{item.mean_shift:.3f}",
            "" if item.var_ratio is None else f"{item.var_ratio:.3f}",
        )


def drift(
    path: str, calls: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> Drift:
    """Compare two pairs of mean and variance, (C,) each, in double precision."""
    (old_mean, old_var), (new_mean, new_var) = before, after
    tiny = 1e-12
    shift = ((new_mean - old_mean) / (new_var + tiny).sqrt()).square().mean().sqrt()
    ratio = ((new_var + tiny) / (old_var + tiny)).log().mean().exp()
    return Drift(path, "estimated", calls, float(shift), float(ratio))
