"""The one way normswap shows things in rows: plans, sites, reports and lists of norms."""

from __future__ import annotations

import io
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

__all__ = ["Listing", "render"]

T = TypeVar("T")


class Listing(Sequence[T]):
    """An immutable sequence that prints as a table.

    Args:
        items: what it holds.

    Attributes:
        whole: how many of the first columns keep each of their lines whole, however narrow it is.
    """

    title: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    whole: ClassVar[int] = 1

    def __init__(self, items: Iterable[T]) -> None:
        self._items = tuple(items)

    @abstractmethod
    def cells(self, item: T) -> Sequence[object]:
        """One row of the table."""

    @abstractmethod
    def summary(self) -> str:
        """All of it in one line."""

    def __getitem__(self, index: Any) -> Any:
        """One item, or a tuple of them for a slice."""
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def __str__(self) -> str:
        cells = map(self.cells, self)
        return render(self.title, self.columns, cells, footer=self.summary(), whole=self.whole)


def render(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    footer: str = "",
    width: int | None = None,
    whole: int = 1,
) -> str:
    """Draw rows as text, no wider than the terminal, or than 160 characters where there is none.

    Args:
        title: a line above the table.
        columns: the headings.
        rows: one sequence of cells a row; each cell is shown by ``str``.
        footer: a line below the table.
        width: characters a line, instead.
        whole: how many of the first columns keep each of their lines whole.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index < whole)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    out = io.StringIO()
    width = width or shutil.get_terminal_size(fallback=(160, 50)).columns
    console = Console(file=out, width=width, color_system=None)
    console.print(table)
    if footer:
        console.print(Text(footer))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
