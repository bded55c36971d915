"""How faithful a conversion is, best first."""

from __future__ import annotations

from enum import Enum

__all__ = ["Fidelity"]


class Fidelity(str, Enum):
    """What can be said of a converted norm's output before anything is trained.

    ``exact``: train and eval outputs are the source's. ``eval``: eval outputs are. ``near``: eval
    outputs are, up to a stated bound. ``calibrated``: the affine is fitted on data. ``matched``:
    the affine is moment-matched from the running statistics, without data. ``affine``: gain and
    offset are copied, outputs differ. ``fresh``: nothing is carried.
    """

    EXACT = "exact"
    EVAL = "eval"
    NEAR = "near"
    CALIBRATED = "calibrated"
    MATCHED = "matched"
    AFFINE = "affine"
    FRESH = "fresh"

    @property
    def rank(self) -> int:
        """0 for the best, growing as fidelity falls."""
        return list(Fidelity).index(self)

    def at_most(self, other: Fidelity) -> Fidelity:
        """The less faithful of the two."""
        return max(self, other, key=lambda each: each.rank)

    def __str__(self) -> str:
        return self.value
