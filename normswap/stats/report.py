"""What a statistics pass did to each norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normswap.table import render

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


class WarmupReport(Sequence[Drift]):
    """The outcome of `normswap.warmup`, norm by norm; prints as a table.

    Attributes:
        method: how the statistics were put together.
        batches: batches read on this rank.
        samples: samples read on this rank.
        skipped: batches left out because of values that are not finite.
        seconds: how long it took.
    """

    def __init__(
        self,
        rows: Sequence[Drift],
        *,
        method: str,
        batches: int,
        samples: int,
        skipped: int,
        seconds: float,
    ) -> None:
        self._rows = tuple(rows)
        self.method = method
        self.batches = batches
        self.samples = samples
        self.skipped = skipped
        self.seconds = seconds

    def __getitem__(self, index: Any) -> Any:
        """One norm's drift, or a tuple of them for a slice."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Drift]:
        return iter(self._rows)

    @property
    def estimated(self) -> list[Drift]:
        """The norms whose statistics were written."""
        return [row for row in self if row.status == "estimated"]

    @property
    def left(self) -> list[Drift]:
        """The norms that were left alone, with the reason as their status."""
        return [row for row in self if row.status != "estimated"]

    def __repr__(self) -> str:
        return f"<WarmupReport: {self._summary()}>"

    def _summary(self) -> str:
        skipped = f", {self.skipped} batches skipped" if self.skipped else ""
        return (
            f"{self.method}: {len(self.estimated)} of {len(self)} norms from {self.samples} "
            f"samples in {self.batches} batches{skipped}, {self.seconds:.1f} s"
        )

    def __str__(self) -> str:
        return render(
            "Warm-up",
            ("path", "status", "calls", "mean moved by (std)", "variance ×"),
            (
                (
                    row.path or "(the model itself)",
                    row.status,
                    row.calls or "",
                    "" if row.mean_shift is None else f"{row.mean_shift:.3f}",
                    "" if row.var_ratio is None else f"{row.var_ratio:.3f}",
                )
                for row in self
            ),
            footer=self._summary(),
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
