"""What ``to`` means: for each site, what it is to become, or that it is left alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from normswap.errors import OptionError
from normswap.graph.site import NormSite
from normswap.norms.factory import FactorySpec
from normswap.norms.spec import NormSpec, Target, spec
from normswap.swap.select import Selector, matches

__all__ = ["To", "Wanted", "wanted"]

#: A name, a spec, a class or factory of the number of channels, or a function of the site.
One = str | Target | type[nn.Module] | Callable[..., Any]

#: One of these, or an ordered mapping of selectors to them, where ``None`` leaves alone.
To = One | Mapping[Any, One | None]

#: What people call a number of channels.
_CHANNELS = frozenset(
    {"c", "ch", "n", "channels", "dim", "features", "num_channels", "num_features", "planes"}
)

#: For a site, what it is to become, or ``None``.
Chooser = Callable[[NormSite], "Target | None"]


class Wanted:
    """What ``to`` asks of each site.

    Args:
        rules: selectors, ``None`` for any site, each with what is wanted; the first match wins.
    """

    def __init__(self, rules: list[tuple[Selector | None, Chooser]]) -> None:
        self.rules = rules

    @property
    def selectors(self) -> list[Selector]:
        """The selectors that the user wrote, which must match something."""
        return [selector for selector, _ in self.rules if selector is not None]

    def of(self, site: NormSite, where: Selector | None) -> tuple[Target | None, str]:
        """What a site is to become, or why nothing."""
        for selector, choose in self.rules:
            if selector is not None and not matches(selector, site):
                continue
            target = choose(site)
            if target is None:
                return None, "left out by to="
            if selector is None and where is None and site.kind not in target.sources:
                reason = f"{site.kind} is not a source of {target.name}; select it by where="
                return None, reason
            return target, ""
        return None, "not in the mapping"


def wanted(to: To, options: Mapping[str, Any]) -> Wanted:
    """Understand ``to``.

    Args:
        to: as for `normswap.plan`.
        options: options of the norms that are given by name or as specs.

    Raises:
        UnknownNorm: a name that no norm has.
        OptionError: an option that a norm does not have, or ``to`` is none of the forms.
    """
    if isinstance(to, Mapping):
        return Wanted([(key, _chooser(value, options)) for key, value in to.items()])
    return Wanted([(None, _chooser(to, options))])


def _chooser(one: Any, options: Mapping[str, Any]) -> Chooser:
    """What one value of ``to`` wants of a site."""
    if one is None:
        return lambda site: None
    target = _target(one, options)
    if target is not None:
        return lambda site: target
    if callable(one) and not isinstance(one, type):
        return partial(_asked, one, options)
    raise OptionError(
        f"to={one!r} is no target; give a norm's name, a normswap.spec, a class or function of the "
        "number of channels, a function of the site, or a mapping of selectors to these"
    )


def _target(one: Any, options: Mapping[str, Any]) -> Target | None:
    """The target that is meant by itself, whatever the site."""
    if isinstance(one, str):
        return spec(one, **options)
    if isinstance(one, NormSpec):
        return spec(one.name, **{**one.options, **options})
    factory = one.func if isinstance(one, partial) else one
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        if options:
            raise OptionError(f"{one!r} takes its options itself; leave out {', '.join(options)}")
        return FactorySpec(one)
    return None


def _asked(
    function: Callable[..., Any], options: Mapping[str, Any], site: NormSite
) -> Target | None:
    """Ask a function of the site, or of the number of channels, whichever it is."""
    factory = FactorySpec(function)
    if _takes_channels(function):
        return factory
    try:
        answer = function(site)
    except Exception as not_of_the_site:
        try:
            factory.make(site.num_features)
        except OptionError:
            raise not_of_the_site from None
        return factory
    if isinstance(answer, nn.Module):
        return FactorySpec(lambda num_features: answer)
    return None if answer is None else _chooser(answer, options)(site)


def _takes_channels(function: Callable[..., Any]) -> bool:
    """Whether a function's first parameter is a number of channels, by annotation or name."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except ValueError:
        return False
    return first is not None and (first.annotation in (int, "int") or first.name in _CHANNELS)
