"""What was done to a model, and what was left, told after the fact."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normswap.graph.modules import read_site
from normswap.norms.fidelity import Fidelity
from normswap.swap.journal import records, skips
from normswap.table import Listing

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


class Report(Listing[Row]):
    """What conversions did to a model; prints as a table."""

    title = "Report"
    columns = ("path", "from", "to", "fidelity", "note")

    def summary(self) -> str:
        """How many were converted and how many skipped."""
        skipped = sum(row.fidelity is None for row in self)
        return f"{len(self) - skipped} converted, {skipped} skipped"

    def cells(self, item: Row) -> tuple[object, ...]:
        """One line of the report as a row."""
        path = item.path or "(the model itself)"
        return (path, item.source, item.to, item.fidelity or "skipped", item.reason)


def report(model: nn.Module) -> Report:
    """Tell what conversions did to a model, and what they had to leave.

    Args:
        model: a converted model, or a copy of one.

    Returns:
        Rows of path, source, target, fidelity and reason; ``print()`` shows a table.
    """
    done = [
        Row(path, read_site(r.original, path).source, str(r.spec), r.fidelity, r.note)
        for path, (_, r) in records(model).items()
    ]
    left = [Row(path, s.source, s.to, None, s.reason) for path, s in skips(model).items()]
    return Report([*done, *left])
