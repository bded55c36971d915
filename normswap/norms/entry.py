"""A norm's entry in the registry: its names, what it is, how it is read and how it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["AFFINE", "EPS", "NormEntry", "Option", "Reader", "Starter"]

#: Reads a module into a `NormState`; called only with modules of the class it is registered for.
Reader = Callable[[nn.Module], NormState]

#: ``start(state, *, carry, **options) -> Start``, pure: it builds and touches nothing.
Starter = Callable[..., Start]


@dataclass(frozen=True)
class Option:
    """An option of a norm.

    Args:
        name: as the user writes it.
        default: what it is when not given; ``None`` means "as the source" or "by a rule".
        doc: one line for the table of norms.
    """

    name: str
    default: object
    doc: str


EPS = Option("eps", None, "added to the variance; None: the source's")
AFFINE = Option("affine", None, "weight and bias; None: as the source, and where the start needs")


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
            the channels; ``"neighbours"``, the layers before and after it.
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
