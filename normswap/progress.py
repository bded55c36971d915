"""The one way normswap shows that it gets on: a bar in a terminal, with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar", "rate"]

#: Told of each step: how much is done by now, and how much it is to be, as far as anyone knows.
Tell = Callable[[int, "float | None"], None]


@contextmanager
def bar(title: str, *, unit: str, shown: bool) -> Iterator[Tell]:
    """Show a bar within the block, where a terminal shows it; it is gone afterwards.

    Args:
        title: what is going on.
        unit: what is counted, such as ``"samples"``.
        shown: whether it is wanted at all.

    Yields:
        What is to be told of each step.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, state="")

        def tell(done: int, total: float | None) -> None:
            progress.update(task, completed=done, total=total)
            speed = progress.tasks[0].speed
            fast = "" if speed is None else f", {rate(speed, unit)}"
            progress.update(task, state=f"{done:,} {unit}{fast},")

        yield tell


def rate(speed: float, unit: str) -> str:
    """How many a second, in words."""
    return f"{speed:,.{0 if speed >= 10 else 2}f} {unit}/s"
