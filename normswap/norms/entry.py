"""A norm's entry in the registry: its names, what it is, how it is read and how it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from sys import float_info
from typing import Any, Literal

from torch import nn

from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = [
    "AFFINE",
    "ANY_SOURCE",
    "BATCH_SOURCES",
    "EPS",
    "MAP_SOURCES",
    "MOMENTUM",
    "SYNC",
    "TOKEN_SOURCES",
    "NormEntry",
    "Option",
    "Reader",
    "Starter",
    "flag",
    "number",
    "whole",
]

#: Reads a module into a `NormState`; called only with modules of the class it is registered for.
Reader = Callable[[nn.Module], NormState]

#: ``start(state, *, carry, **options) -> Start``, pure: it builds and touches nothing.
Starter = Callable[..., Start]

#: Families that a norm converts when not told otherwise: those of batches, of any feature maps, of
#: what stands in transformers, of all.
BATCH_SOURCES = frozenset({"batch_norm"})
MAP_SOURCES = BATCH_SOURCES | {"group_norm", "instance_norm"}
TOKEN_SOURCES = frozenset({"layer_norm", "rms_norm"})
ANY_SOURCE = MAP_SOURCES | TOKEN_SOURCES | {"identity"}


@dataclass(frozen=True)
class Option:
    """An option of a norm.

    Args:
        name: as the user writes it.
        default: what it is when not given; ``None`` means "as the source" or "by a rule".
        doc: one line for the table of norms.
        expects: what a value has to be, in words; empty if the starter says so itself.
        fits: whether a value is that; ``None`` always is.
        needs: what the start must be told of the site where it is set, as for `NormEntry`; such
            an option says how a norm starts, and is no setting of the norm.
    """

    name: str
    default: object
    doc: str
    expects: str = ""
    fits: Callable[[Any], bool] = field(default=lambda value: True, repr=False)
    needs: str = ""


def flag(name: str, default: bool | None, doc: str, *, needs: str = "") -> Option:
    """An option that is on or off."""

    def fits(value: Any) -> bool:
        return isinstance(value, bool)

    return Option(name, default, doc, "True or False", fits, needs)


def number(name: str, doc: str, *, low: float, high: float) -> Option:
    """An option that is a number within bounds, or as the source."""

    def fits(value: Any) -> bool:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and low <= value <= high

    return Option(name, None, doc, f"a number from {low} to {high}", fits)


def whole(
    name: str, default: int | None, doc: str, *, low: int = 1, high: int | None = None
) -> Option:
    """An option that is a whole number from a least one on, maybe up to a largest."""

    def fits(value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return low <= value and (high is None or value <= high)

    return Option(
        name, default, doc, f"{low} or more" if high is None else f"{low} to {high}", fits
    )


SYNC = (
    flag("sync", False, "pool over all ranks; DDP takes it on CPU too"),
    Option("process_group", None, "the ranks that share statistics; None: all"),
)
MOMENTUM = number("momentum", "weight of the newest batch; None: the source's", low=0.0, high=1.0)
EPS = number("eps", "added to the variance; None: the source's", low=0.0, high=float_info.max)
AFFINE = flag("affine", None, "weight and bias; None: as the source, and where the start needs")


@dataclass(frozen=True)
class NormEntry:
    """One norm: a target of `normswap.convert`, and what its modules are read by.

    Args:
        name: the registry name.
        aliases: other names for it.
        kind: its family, for ``where="kind:..."`` and for other norms' default sources.
        axis: what it changes in BatchNorm: statistics, standardization or affine.
        pooled: what its statistics are pooled over, in words.
        paper: citation, with arXiv id.
        sources: families it converts when ``where`` is not given.
        start: the starter.
        reads: the readers of its modules, by class.
        options: what can be set.
        inputs: extra keyword inputs that a converted model takes.
        needs: what the starter must be told of the site: ``"dim"``, how many dimensions follow
            the channels; ``"neighbours"``, the layers before and after it; ``"previous"``, the
            norm before the layer before it; ``"activation"``, what alone reads it; ``"stream"``,
            the residual stream that it reads.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    axis: Literal["statistics", "standardization", "affine", "none"]
    pooled: str
    paper: str
    sources: frozenset[str]
    start: Starter
    reads: Mapping[type[nn.Module], Reader] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    inputs: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()

    @property
    def stands_alone(self) -> bool:
        """Whether its modules are layers of their own, called with one input."""
        return not self.inputs and "neighbours" not in self.needs
