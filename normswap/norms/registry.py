"""The one place that knows every norm: by name as a target, by class as a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normswap.errors import OptionError, UnknownNorm, did_you_mean
from normswap.norms import batch, frozen, group, identity, instance, layer, rms, sync_batch
from normswap.norms.entry import NormEntry, Reader
from normswap.norms.furnish import furnish
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState, fresh_state
from normswap.table import Listing

__all__ = ["NormList", "NormSpec", "add_readers", "build", "kinds", "list_norms", "reader", "spec"]

_ENTRIES: dict[str, NormEntry] = {
    entry.name: entry
    for module in (batch, sync_batch, frozen, group, instance, layer, rms, identity)
    for entry in module.ENTRIES
}
_READERS: dict[type[nn.Module], Reader] = {
    cls: read for entry in _ENTRIES.values() for cls, read in entry.reads.items()
}


@dataclass(frozen=True)
class NormSpec:
    """A norm with its options: what a site is to become. Made by `normswap.spec`.

    Args:
        name: the registry name.
        options: the options given, by name.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> NormEntry:
        """The registry's entry."""
        return _ENTRIES[self.name]

    def start(self, state: NormState, *, carry: Carry = "auto") -> Start:
        """Ask the norm how it starts from a source."""
        return self.entry.start(state, carry=carry, **self.options)

    def describes(self, state: NormState) -> bool:
        """Whether a norm of this state is what is asked for, so that nothing is to be done."""
        if state.norm != self.name:
            return False
        asked = {option.name: option.default for option in self.entry.options} | dict(self.options)
        return all(
            state.settings.get(name) == value for name, value in asked.items() if value is not None
        )

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options))))

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def spec(name: str, **options: Any) -> NormSpec:
    """Name a norm and its options; accepted wherever ``to`` is.

    Args:
        name: registry name or alias, upper or lower case.
        options: the norm's options, see `normswap.list_norms`.

    Raises:
        UnknownNorm: no norm has the name; near ones are suggested.
        OptionError: the norm does not have an option.
    """
    entry = _lookup(name)
    known = [option.name for option in entry.options]
    for option in options:
        if option not in known:
            raise OptionError(
                f"{entry.name} has no option {option!r}.{did_you_mean(option, known)} "
                + (f"It has {', '.join(known)}." if known else "It has none.")
            )
    return NormSpec(entry.name, options)


def _lookup(name: str) -> NormEntry:
    names = {alias: entry for entry in _ENTRIES.values() for alias in (entry.name, *entry.aliases)}
    found = names.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise UnknownNorm(
            f"no norm is called {name!r}.{did_you_mean(str(name).lower(), names)} "
            f"Known: {', '.join(_ENTRIES)}."
        )
    return found


def reader(cls: type[nn.Module]) -> tuple[Reader, type[nn.Module]] | None:
    """Return the reader for a class and the known class it is registered for, or ``None``.

    A subclass is found by its nearest known ancestor.
    """
    for ancestor in cls.__mro__:
        if ancestor in _READERS:
            return _READERS[ancestor], ancestor
    return None


def add_readers(readers: Mapping[type[nn.Module], Reader]) -> None:
    """Let modules of further classes be read; the same class again replaces its reader."""
    _READERS.update(readers)


def kinds() -> list[str]:
    """The families that norms belong to."""
    return sorted({entry.kind for entry in _ENTRIES.values()})


def build(name: str, num_features: int, *, dim: int = 2, **options: Any) -> nn.Module:
    """Make one norm, with unit gain and zero offset.

    Args:
        name: registry name or alias.
        num_features: channels, C.
        dim: number of spatial dimensions of its input: 1, 2 or 3.
        options: the norm's options, see `normswap.list_norms`.

    Returns:
        A module for inputs (N, C, ...) with ``dim`` dimensions after the channels.
    """
    state = fresh_state(num_features, dim=dim)
    return furnish(state, spec(name, **options).start(state)).module


class NormList(Listing[NormEntry]):
    """The registered norms; prints as a table."""

    title = "Norms"
    columns = (
        "name",
        "aliases",
        "axis",
        "pooled over",
        "converts by default",
        "inputs",
        "options",
        "paper",
    )

    def summary(self) -> str:
        """How many there are."""
        return f"{len(self)} norms"

    def cells(self, item: NormEntry) -> tuple[object, ...]:
        """One norm as a row."""
        return (
            item.name,
            "\n".join(item.aliases),
            item.axis,
            item.pooled,
            "\n".join(sorted(item.sources)),
            "\n".join(item.inputs),
            "\n".join(option.name for option in item.options),
            item.paper,
        )


def list_norms() -> NormList:
    """Every norm that can be a target; ``print()`` shows a table."""
    return NormList(_ENTRIES.values())
