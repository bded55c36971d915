"""What a statistics pass did to each norm."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from normswap.picture import Panel, draw
from normswap.progress import rate
from normswap.stats.convergence import Point
from normswap.stats.strict_json import strict
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
        passes: how often the loader was read: more than once where forwards of the model disturb
            each other, so that each had to run alone.
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
        passes: int = 1,
        tol: float | None = None,
        convergence: Sequence[Point] = (),
    ) -> None:
        super().__init__(rows)
        self.method = method
        self.batches = batches
        self.samples = samples
        self.skipped = skipped
        self.seconds = seconds
        self.passes = passes
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

    @property
    def samples_per_second(self) -> float:
        """Throughput of this rank."""
        return self.samples / self.seconds

    @property
    def samples_needed(self) -> int | None:
        """Samples after which the tolerance was met; ``None`` if it never was, or none was set."""
        if self.tol is None:
            return None
        return next((p.samples for p in self.convergence if p.error <= self.tol), None)

    def summary(self) -> str:
        """How many norms from how much data, how long it took, and how well they are known."""
        skipped = f", {self.skipped} batches skipped" if self.skipped else ""
        alone = f", each run alone and read {self.passes} times" if self.passes > 1 else ""
        return (
            f"{self.method}: {len(self.estimated)} of {len(self)} norms from {self.samples} "
            f"samples in {self.batches} batches{skipped}{alone}, {self.seconds:.1f} s, "
            f"{rate(self.samples_per_second, 'samples')}{self._tolerance()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as strict JSON can hold it: numbers, texts, lists and mappings by name.

        ``None`` stands for numbers that are not finite, as where the old statistics were not.
        """
        names = (
            "method",
            "batches",
            "samples",
            "skipped",
            "seconds",
            "passes",
            "samples_per_second",
        )
        told: dict[str, Any] = strict(
            {
                **{name: getattr(self, name) for name in (*names, "tol", "samples_needed")},
                "norms": [asdict(row) for row in self],
                "convergence": [asdict(point) for point in self.convergence],
            }
        )
        return told

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw how far each norm's statistics moved, and how well they were known on the way.

        Args:
            path: where the picture goes; its ending says the format, such as ``.png``.

        Raises:
            MissingExtra: matplotlib is not installed.
            OptionError: the picture cannot be written there.
        """
        columns = [self._drift_panels()]
        if self.convergence:
            columns.append([self._convergence_panel()])
        draw(path, columns, title=f"{self.title}, {self.summary()}")

    def _tolerance(self) -> str:
        if self.tol is None:
            return ""
        if self.samples_needed is not None:
            return f"; known to {self.tol:g} after {self.samples_needed} samples"
        if not self.convergence:
            return f"; not known to {self.tol:g}: too few batches to tell"
        last = self.convergence[-1]
        return f"; not known to {self.tol:g}: {_named(last.worst)} only to {last.error:.2g}"

    def _drift_panels(self) -> list[Panel]:
        names = [_named(row.path) for row in self.estimated]
        shifts = [row.mean_shift for row in self if row.mean_shift is not None]
        ratios = [row.var_ratio for row in self if row.var_ratio is not None]
        where = "norms, in the order of the model"
        return [
            Panel(
                "Drift along depth",
                where,
                "mean moved by\n(new standard deviations)",
                {"mean": shifts},
                names=names,
            ),
            Panel(
                "",
                where,
                "variance, new over old",
                {"variance": ratios},
                names=names,
                base=1.0,
                log="y",
            ),
        ]

    def _convergence_panel(self) -> Panel:
        points = self.convergence
        return Panel(
            "Convergence of the norm known least",
            "samples read",
            "standard error",
            {
                "variance, relative to it": [point.var_error for point in points],
                "mean, in standard deviations": [point.mean_error for point in points],
            },
            kind="line",
            places=[point.samples for point in points],
            rules={} if self.tol is None else {f"tol={self.tol:g}": self.tol},
            log="xy",
        )

    def cells(self, item: Drift) -> tuple[object, ...]:
        """One norm as a row."""
        return (
            _named(item.path),
            item.status,
            item.calls or "",
            "" if item.mean_shift is None else f"{item.mean_shift:.3f}",
            "" if item.var_ratio is None else f"{item.var_ratio:.3f}",
        )


def _named(path: str) -> str:
    return path or "(the model itself)"


def drift(
    path: str, calls: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> Drift:
    """Compare two pairs of mean and variance, (C,) each, in double precision."""
    (old_mean, old_var), (new_mean, new_var) = before, after
    tiny = 1e-12
    shift = ((new_mean - old_mean) / (new_var + tiny).sqrt()).square().mean().sqrt()
    ratio = ((new_var + tiny) / (old_var + tiny)).log().mean().exp()
    return Drift(path, "estimated", calls, float(shift), float(ratio))
