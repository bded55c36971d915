"""Selectors: which sites a ``where``, a ``skip`` or a mapping's key means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normswap.errors import NothingMatched, OptionError, UnknownNorm, did_you_mean
from normswap.graph.site import NormSite
from normswap.norms.registry import kinds, lookup

__all__ = ["Selector", "matches", "require_match", "select"]

#: A glob on the path, ``"re:..."``, ``"kind:..."``, a module type, a predicate, or a list of these.
Selector = str | type[nn.Module] | Callable[[NormSite], bool] | Sequence[Any]


def matches(selector: Selector, site: NormSite) -> bool:
    """Whether a selector means a site, under any of its names.

    Raises:
        OptionError: the selector is none of the forms there are.
    """
    if isinstance(selector, str):
        if selector.startswith("re:"):
            pattern = _compiled(selector)
            return any(pattern.fullmatch(name) for name in site.names)
        if selector.startswith("kind:"):
            return site.kind == _kind(selector)
        return any(fnmatchcase(name, selector) for name in site.names)
    if isinstance(selector, type):
        return isinstance(site.module, selector)
    if callable(selector):
        return bool(selector(site))
    if isinstance(selector, Iterable):
        return any(matches(part, site) for part in selector)
    raise OptionError(
        f"{selector!r} is no selector; give a glob, 're:...', 'kind:...', a module type, "
        "a predicate on the site, or a list of these"
    )


def select(selector: Selector, sites: Iterable[NormSite], what: str) -> list[NormSite]:
    """The sites that a selector means; each part of a list must mean at least one.

    Args:
        selector: see `Selector`.
        sites: the candidates.
        what: what the selector was given as, for the message: ``"where"``, ``"skip"``.

    Raises:
        NothingMatched: it means none; near misses are suggested.
    """
    sites = list(sites)
    require_match(selector, sites, what)
    return [site for site in sites if matches(selector, site)]


def require_match(selector: Selector, sites: Sequence[NormSite], what: str) -> None:
    """Raise `NothingMatched` if the selector, or a part of a list of them, means no site."""
    if isinstance(selector, Iterable) and not isinstance(selector, (str, type)):
        for part in selector:
            require_match(part, sites, what)
    elif not any(matches(selector, site) for site in sites):
        raise NothingMatched(
            f"{what}={_shown(selector)} matches none of the {len({s.path for s in sites})} "
            "normalizations."
            + _near(selector, sites)
            + " print(normswap.find(model)) shows them all."
        )


def _near(selector: Selector, sites: Sequence[NormSite]) -> str:
    if not isinstance(selector, str):
        present = sorted({type(site.module).__name__ for site in sites})
        return f" There are {', '.join(present)}." if present else ""
    if selector.startswith("kind:"):
        return f" There are {', '.join(sorted({site.kind for site in sites})) or 'none at all'}."
    return did_you_mean(selector, {name for site in sites for name in site.names})


def _kind(selector: str) -> str:
    """The family that is meant: by its own name, or by the name of any norm in it."""
    name = selector.removeprefix("kind:")
    if name in kinds():
        return name
    try:
        return lookup(name).kind
    except UnknownNorm:
        return name


def _compiled(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise OptionError(f"{selector!r} is no regular expression: {error}") from None


def _shown(selector: Selector) -> str:
    return selector.__name__ if isinstance(selector, type) else repr(selector)
