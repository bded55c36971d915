"""What normswap refuses, and how it says so: what, where, why, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CannotConvert",
    "CannotRevert",
    "DegeneratePooling",
    "InputError",
    "MissingExtra",
    "NormSwapError",
    "NormSwapWarning",
    "NothingMatched",
    "NothingToConvert",
    "OptionError",
    "RecipeError",
    "StalePlan",
    "StatisticsError",
    "TooUnfaithful",
    "UnknownNorm",
    "UnsupportedModel",
    "did_you_mean",
]


class NormSwapError(ValueError):
    """Base of every error that normswap raises; the model is as it was before the call."""


class UnknownNorm(NormSwapError):
    """No registered norm bears the name."""


class OptionError(NormSwapError):
    """An option that the norm does not have, or a value that it cannot take."""


class NothingMatched(NormSwapError):
    """A selector (``where``, ``skip``, a mapping's key) matches no normalization."""


class NothingToConvert(NormSwapError):
    """Not one normalization of the model is left to convert."""


class UnsupportedModel(NormSwapError):
    """A model that cannot be rewritten as it stands: scripted, wrapped, compiled, ..."""


class TooUnfaithful(NormSwapError):
    """``strict`` or ``min_fidelity`` forbids what the plan would have to do."""


class StalePlan(NormSwapError):
    """The model changed between ``plan`` and ``apply``."""


class CannotRevert(NormSwapError):
    """A conversion that cannot be taken back, because of what happened since."""


class RecipeError(NormSwapError):
    """A recipe, or a file with one, that cannot be written or does not fit."""


class MissingExtra(NormSwapError):
    """A library is not installed that only a part of normswap needs."""


class StatisticsError(NormSwapError):
    """A statistics pass cannot yield statistics; none was written."""


class DegeneratePooling(NormSwapError):
    """A statistic would be pooled over a single value, which erases the input."""


class InputError(NormSwapError):
    """An extra input of a model's norms that is missing, or is not what is expected."""


class CannotConvert(NormSwapError):
    """One normalization cannot become what was asked.

    Args:
        reason: why, without naming the place.
        remedy: what the user can do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")


class NormSwapWarning(UserWarning):
    """Something was done less well than hoped; the report says what."""


def did_you_mean(word: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
