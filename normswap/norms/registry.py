"""The one place that knows every norm: by name as a target, by class as a source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import nn

from normswap.errors import OptionError, UnknownNorm, did_you_mean
from normswap.norms import fold, identity
from normswap.norms.affine import (
    adaptive_convolution,
    affine_mixture,
    attentive,
    batch_instance,
    conditional,
    enhanced,
    region_style,
    spatial,
    style,
)
from normswap.norms.entry import NormEntry, Option, Reader, Starter
from normswap.norms.functional import FunctionalNorm, read_functional
from normswap.norms.inputs.norm import InputNorm
from normswap.norms.standardization import (
    adaptive,
    batch_channel,
    cosine,
    dynamic,
    evonorm,
    extended,
    filter_response,
    kalman,
    mean_deviation,
    power,
    rms,
    scale,
    standardized_weight,
    transferable,
    whitening,
)
from normswap.norms.statistics import (
    batch,
    channel,
    cross_iteration,
    domain_specific,
    frozen,
    ghost,
    group,
    instance,
    instance_batch,
    layer,
    local_context,
    moving_average,
    region_learned,
    region_mask,
    renormalized,
    sparse_switchable,
    split_batch,
    switchable,
    sync_batch,
)
from normswap.table import Listing

__all__ = ["NormList", "add_readers", "kinds", "list_norms", "lookup", "reader", "register"]

_ENTRIES: dict[str, NormEntry] = {
    entry.name: entry
    for module in (
        batch,
        sync_batch,
        frozen,
        ghost,
        cross_iteration,
        renormalized,
        mean_deviation,
        moving_average,
        whitening,
        group,
        instance,
        layer,
        rms,
        local_context,
        region_learned,
        channel,
        switchable,
        sparse_switchable,
        extended,
        filter_response,
        evonorm,
        batch_channel,
        batch_instance,
        instance_batch,
        adaptive,
        enhanced,
        transferable,
        affine_mixture,
        region_mask,
        domain_specific,
        split_batch,
        conditional,
        style,
        adaptive_convolution,
        spatial,
        region_style,
        attentive,
        kalman,
        cosine,
        standardized_weight,
        dynamic,
        scale,
        power,
        identity,
        fold,
    )
    for entry in module.ENTRIES
}
_READERS: dict[type[nn.Module], Reader] = {
    cls: read for entry in _ENTRIES.values() for cls, read in entry.reads.items()
}
_READERS[FunctionalNorm] = read_functional


def lookup(name: str) -> NormEntry:
    """The entry of a norm, by its name or an alias, in upper or lower case.

    Raises:
        UnknownNorm: no norm has the name; near ones are suggested.
    """
    key = name.lower() if isinstance(name, str) else ""
    found = _ENTRIES.get(key) or next((e for e in _ENTRIES.values() if key in e.aliases), None)
    if found is None:
        names = [each for entry in _ENTRIES.values() for each in (entry.name, *entry.aliases)]
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


def register(
    name: str,
    *,
    reads: Mapping[type[nn.Module], Reader],
    sources: Iterable[str] = ("batch_norm",),
    aliases: Iterable[str] = (),
    kind: str | None = None,
    axis: Literal["statistics", "standardization", "affine", "none"] = "statistics",
    pooled: str = "",
    paper: str = "",
    inputs: Iterable[str] = (),
    needs: Iterable[str] = (),
) -> Callable[[Starter], Starter]:
    """Make a norm of your own a target and a source; decorates its starter.

    The starter ``start(state, *, carry="auto", **options) -> Start`` says how the norm starts
    from any other; its keyword arguments after ``carry`` are the norm's options.

    Args:
        name: what it is called; the same name again replaces the earlier entry.
        reads: for each of its classes, a function from a module to the `NormState` that it is in.
        sources: families that it converts when ``where`` is not given.
        aliases: other names for it.
        kind: its family; default a family of its own, called like it.
        axis: what it changes in BatchNorm.
        pooled: what its statistics are pooled over, in words.
        paper: citation.
        inputs: extra keyword inputs that a converted model takes; what each may be is said by the
            classes, which are made of `normswap.InputNorm`.
        needs: what the starter must be told of the site: ``"dim"``, the number of dimensions
            after the channels; ``"neighbours"``, the layers before and after it; ``"previous"``,
            the norm before the layer before it; ``"activation"``, the activation behind it.

    Raises:
        OptionError: a name is taken by another norm, or the norm has extra inputs and no class
            that takes any.
    """
    if inputs and not any(issubclass(cls, InputNorm) for cls in reads):
        raise OptionError(
            f"{name} has extra inputs, and none of its classes takes any: make it of "
            "normswap.InputNorm, and have that class in reads="
        )

    def decorate(start: Starter) -> Starter:
        parameters = list(inspect.signature(start).parameters.values())[1:]
        entry = NormEntry(
            name=name,
            aliases=tuple(aliases),
            kind=kind or name,
            axis=axis,
            pooled=pooled,
            paper=paper,
            sources=frozenset(sources),
            start=start,
            reads=dict(reads),
            options=tuple(
                Option(parameter.name, parameter.default, "")
                for parameter in parameters
                if parameter.name != "carry"
            ),
            inputs=tuple(inputs),
            needs=frozenset(needs),
        )
        for known in _ENTRIES.values():
            taken = {known.name, *known.aliases} & {name, *entry.aliases}
            if known.name != name and taken:
                raise OptionError(f"{sorted(taken)} is taken by {known.name}; choose another name")
        _ENTRIES[name] = entry
        add_readers(entry.reads)
        return start

    return decorate


def kinds() -> list[str]:
    """The families that norms belong to."""
    return sorted({entry.kind for entry in _ENTRIES.values()})


class NormList(Listing[NormEntry]):
    """The registered norms; prints as a table."""

    title = "Norms"
    whole = 2
    columns = (
        "name",
        "aliases",
        "axis",
        "pooled over",
        "converts",
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
