"""The one way normswap draws a table: plans, sites, reports and lists of norms."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

__all__ = ["render"]


def render(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    footer: str = "",
    width: int | None = None,
) -> str:
    """Draw rows as text, no wider than the terminal, or than 160 characters where there is none.

    Args:
        title: a line above the table.
        columns: the headings.
        rows: one sequence of cells a row; each cell is shown by ``str``.
        footer: a line below the table.
        width: characters a line, instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    out = io.StringIO()
    width = width or shutil.get_terminal_size(fallback=(160, 50)).columns
    console = Console(file=out, width=width, color_system=None)
    console.print(table)
    if footer:
        console.print(Text(footer))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
