"""What a calibration did to each norm, and to the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from normswap.stats.strict_json import strict
from normswap.table import Listing

__all__ = ["CalibrationReport", "Kept", "SiteFit"]

#: Which affines proved best on held-out batches: those there were, those fitted norm by norm, or
#: those refined together.
Kept = Literal["as before", "fitted", "refined"]


@dataclass(frozen=True)
class SiteFit:
    """How far one norm's output is from its original's, on held-out batches.

    Args:
        path: where the norm is.
        status: ``"calibrated"``, or why it was left alone.
        before: relative error before: norm of the difference over norm of the original's output.
        after: relative error afterwards.
    """

    path: str
    status: str
    before: float | None = None
    after: float | None = None


class CalibrationReport(Listing[SiteFit]):
    """The outcome of `normswap.calibrate`, norm by norm; prints as a table.

    Attributes:
        method: how each norm was fitted.
        kept: which affines the model has now.
        output_before: relative error of what the model returns, before, on held-out batches.
        output_fitted: the same after the fit norm by norm.
        output_after: the same with what was kept.
        batches: batches read on this rank, held-out ones included.
        held_out: how many of them were held out; 0 where one batch had to serve for both.
        samples: samples read on this rank.
        note: what else there is to say.
        seconds: how long it took.
    """

    title = "Calibration"
    columns = ("path", "status", "error before", "error after")

    def __init__(
        self,
        rows: Iterable[SiteFit],
        *,
        method: str,
        kept: Kept,
        output_before: float,
        output_fitted: float,
        output_after: float,
        batches: int,
        held_out: int,
        samples: int,
        note: str,
        seconds: float,
    ) -> None:
        super().__init__(rows)
        self.method = method
        self.kept = kept
        self.output_before = output_before
        self.output_fitted = output_fitted
        self.output_after = output_after
        self.batches = batches
        self.held_out = held_out
        self.samples = samples
        self.note = note
        self.seconds = seconds

    @property
    def calibrated(self) -> list[SiteFit]:
        """The norms that were fitted."""
        return [row for row in self if row.status == "calibrated"]

    @property
    def left(self) -> list[SiteFit]:
        """The norms that were left alone, with the reason as their status."""
        return [row for row in self if row.status != "calibrated"]

    def summary(self) -> str:
        """What it did to the output, from how much data, and how long it took."""
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.method}: output error {self.output_before:.3g} before, "
            f"{self.output_fitted:.3g} fitted norm by norm, {self.output_after:.3g} as kept "
            f"({self.kept}); {len(self.calibrated)} of {len(self)} norms from {self.samples} "
            f"samples in {self.batches} batches, {self.held_out} held out, "
            f"{self.seconds:.1f} s{note}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as strict JSON can hold it: ``None`` for numbers that are not finite."""
        told = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        whole: dict[str, Any] = strict(told | {"sites": [asdict(row) for row in self]})
        return whole

    def cells(self, item: SiteFit) -> tuple[object, ...]:
        """One norm as a row."""
        return (
            item.path or "(the model itself)",
            item.status,
            "" if item.before is None else f"{item.before:.3f}",
            "" if item.after is None else f"{item.after:.3f}",
        )
