"""What was done to a model, and what was left, told after the fact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normswap.norms.fidelity import Fidelity
from normswap.swap.journal import records, skips
from normswap.table import render

__all__ = ["Report", "Row", "report"]


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Args:
        path: where in the model; empty for the model itself.
        source: class of the first original.
        to: the norm asked for, with its options.
        fidelity: how faithful the last conversion was; ``None`` where it was skipped.
        reason: what there is to say, for a skipped site why.
    """

    path: str
    source: str
    to: str
    fidelity: Fidelity | None
    reason: str


class Report(Sequence[Row]):
    """What conversions did to a model; prints as a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def __getitem__(self, index: Any) -> Any:
        """One row, or a tuple of them for a slice."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"<Report: {self._summary()}>"

    def _summary(self) -> str:
        skipped = sum(row.fidelity is None for row in self)
        return f"{len(self) - skipped} converted, {skipped} skipped"

    def __str__(self) -> str:
        return render(
            "Report",
            ("path", "from", "to", "fidelity", "note"),
            (
                (
                    row.path or "(the model itself)",
                    row.source,
                    row.to,
                    row.fidelity or "skipped",
                    row.reason,
                )
                for row in self
            ),
            footer=self._summary(),
        )


def report(model: nn.Module) -> Report:
    """Tell what conversions did to a model; see `normswap.report`."""
    done = [
        Row(path, type(r.original).__name__, str(r.spec), r.fidelity, r.note)
        for path, (_, r) in records(model).items()
    ]
    left = [Row(path, s.source, s.to, None, s.reason) for path, s in skips(model).items()]
    return Report([*done, *left])
