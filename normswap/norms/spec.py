"""What a site is to become: a registered norm with its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normswap.errors import OptionError, did_you_mean
from normswap.norms.entry import NormEntry
from normswap.norms.furnish import furnish
from normswap.norms.registry import lookup
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState, fresh_state

__all__ = ["NormSpec", "Target", "build", "spec"]


class Target(ABC):
    """What a site is to become."""

    name: str

    @property
    @abstractmethod
    def sources(self) -> frozenset[str]:
        """Families that it converts when ``where`` is not given."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What its start must be told of the site."""

    def settled(self, state: NormState) -> Target:
        """The target that it is for a source, where that is only known now."""
        return self

    @abstractmethod
    def start(self, state: NormState, *, carry: Carry = "auto") -> Start:
        """Ask how it starts from a source."""

    @abstractmethod
    def describes(self, state: NormState) -> bool:
        """Whether a norm of this state is what is asked for, so that nothing is to be done."""


@dataclass(frozen=True)
class NormSpec(Target):
    """A registered norm with its options, made by `normswap.spec`.

    Args:
        name: the registry name.
        options: the options given, by name.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> NormEntry:
        """The registry's entry."""
        return lookup(self.name)

    @property
    def sources(self) -> frozenset[str]:
        """Families that it converts when ``where`` is not given."""
        return self.entry.sources

    @property
    def needs(self) -> frozenset[str]:
        """What its start must be told of the site."""
        set_here = (option for option in self.entry.options if self.options.get(option.name))
        return self.entry.needs | {option.needs for option in set_here if option.needs}

    def start(self, state: NormState, *, carry: Carry = "auto") -> Start:
        """Ask the norm how it starts from a source."""
        return self.entry.start(state, carry=carry, **self.options)

    def describes(self, state: NormState) -> bool:
        """Whether a norm of this state is what is asked for, so that nothing is to be done."""
        if state.norm != self.name:
            return False
        settings = [option for option in self.entry.options if not option.needs]
        asked = {o.name: self.options.get(o.name, o.default) for o in settings}
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
        OptionError: the norm does not have an option, or it cannot have the value.
    """
    entry = lookup(name)
    known = [option.name for option in entry.options]
    for name_given in options:
        if name_given not in known:
            raise OptionError(
                f"{entry.name} has no option {name_given!r}.{did_you_mean(name_given, known)} "
                + (f"It has {', '.join(known)}." if known else "It has none.")
            )
    for option in entry.options:
        value = options.get(option.name)
        if value is not None and not option.fits(value):
            raise OptionError(
                f"{entry.name}: {option.name}={value!r} should be {option.expects}, or None"
            )
    return NormSpec(entry.name, options)


def build(name: str, num_features: int, *, dim: int = 2, **options: Any) -> nn.Module:
    """Make one norm, with unit gain and zero offset.

    Args:
        name: registry name or alias.
        num_features: channels, C.
        dim: number of spatial dimensions of its input: 1, 2 or 3.
        options: the norm's options, see `normswap.list_norms`.

    Returns:
        A module for inputs (N, C, ...) with ``dim`` dimensions after the channels.

    Raises:
        UnknownNorm: no norm has the name.
        OptionError: an option does not fit, or the norm is no layer by itself.
    """
    if "neighbours" in lookup(name).needs:
        raise OptionError(
            f"{lookup(name).name} is no layer by itself, as it takes the layer before it along; "
            f"make the two together: normswap.convert(nn.Sequential(layer, nn.BatchNorm2d("
            f"{num_features})), to={name!r})"
        )
    state = fresh_state(num_features, dim=dim)
    made = furnish(state, spec(name, **options).start(state))
    for tensor, flag in made.requires_grad.items():
        made.module.get_parameter(tensor).requires_grad_(flag)
    return made.module
