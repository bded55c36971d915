"""Seeing to it that a loader that is read again yields what it has yielded before."""

from __future__ import annotations

from typing import Any

from normswap.errors import StatisticsError
from normswap.stats.bookmark import digest

__all__ = ["Rereading"]


class Rereading:
    """Follows a loader, batch by batch, through all its readings."""

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._at = 0

    def rewind(self) -> None:
        """Say that the loader is read from its start."""
        self._at = 0

    def turn(self, batch: Any) -> None:
        """Follow by one batch.

        Raises:
            StatisticsError: another one came in its place before.
        """
        now = digest(batch)
        if self._at == len(self._seen):
            self._seen.append(now)
        elif self._seen[self._at] != now:
            raise _other_data(self._at)
        self._at += 1

    def close(self) -> None:
        """Say that the loader has ended.

        Raises:
            StatisticsError: it went on before.
        """
        if self._at < len(self._seen):
            raise _other_data(self._at)


def _other_data(index: int) -> StatisticsError:
    return StatisticsError(
        "forwards of this model disturb each other: what one keeps on the model while it waits at "
        "a norm, the next overwrites; so each has to run alone, which takes reading the loader "
        f"once for every norm, and batch {index} (counted from 0) is another at each reading, or "
        "is there only once; let the loader yield the same batches every time (shuffle=False, no "
        'random augmentation, a list), or use method="pooled"'
    )
