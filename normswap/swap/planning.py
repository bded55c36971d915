"""Deciding what happens to every normalization of a model, before anything is touched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from normswap.errors import CannotConvert, OptionError
from normswap.graph.modules import find, read_site
from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.functional import FunctionalNorm
from normswap.norms.spec import Target
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState
from normswap.swap.demands import refuse_empty, refuse_idle, refuse_unfaithful
from normswap.swap.guards import (
    refuse_taken_names,
    refuse_unread,
    refuse_unready,
    refuse_unsupported,
)
from normswap.swap.journal import record_of, records
from normswap.swap.plan import Plan
from normswap.swap.select import Selector, matches, require_match
from normswap.swap.step import Step
from normswap.swap.surroundings import Surroundings
from normswap.swap.targets import To, Wanted, wanted

__all__ = ["plan"]


_REMEDIES = {
    "batch": "give larger example_inputs, and train on larger batches",
    "group": "use fewer groups or larger maps",
    "position": "use more channels",
    "mixture": "give larger example_inputs, and train on larger batches",
}


def plan(
    model: nn.Module,
    to: To,
    *,
    where: Selector | None = None,
    skip: Selector | None = None,
    example_inputs: Any = None,
    carry: Carry = "auto",
    strict: bool = False,
    min_fidelity: str | Fidelity | None = None,
    **options: Any,
) -> Plan:
    """Say what `convert` would do to every normalization, without touching the model.

    Args:
        model: any module that is not scripted, wrapped for ranks or compiled.
        to: a norm's name; a `normswap.spec`; a class or function of the number of channels that
            gives a module; a function of the site that gives any of these, a module or ``None``;
            or an ordered mapping of selectors to these, of which the first that matches wins and
            ``None`` leaves alone.
        where: what to convert: a glob on the path (``"layer1.*"``), ``"re:..."`` on the whole
            path, ``"kind:batch_norm"``, a module type, a predicate on the site, or a list of
            these. Default: the families that the target converts by default, see `list_norms`.
        skip: what to leave out, likewise.
        example_inputs: as for `find`; tells dimensions and sizes that nothing else tells.
        carry: ``"auto"``: the most faithful start there is; ``"copy"``: weight and bias as they
            are; ``"fresh"``: nothing.
        strict: raise if a chosen norm cannot be converted, instead of skipping it.
        min_fidelity: raise if one would be less faithful than this: ``"exact"``, ``"eval"``,
            ``"near"``, ``"calibrated"``, ``"matched"``, ``"affine"`` or ``"fresh"``.
        **options: the target's options, see `list_norms`.

    Returns:
        The plan; ``print()`` shows a table, ``apply()`` makes it happen.

    Raises:
        UnknownNorm: no norm has the name.
        OptionError: an option that the norm does not have or cannot take.
        NothingMatched: a selector matches nothing.
        NothingToConvert: no norm of the model is left to convert.
        UnsupportedModel: the model cannot be rewritten as it stands.
        TooUnfaithful: ``strict`` or ``min_fidelity`` cannot be kept.
    """
    refuse_unsupported(model)
    if carry not in ("auto", "copy", "fresh"):
        raise OptionError(f'carry={carry!r} is none of "auto", "copy", "fresh"')
    asked = wanted(to, options)
    sites = list(find(model, example_inputs))
    if not records(model):  # a class that is not registered may have taken the place of all
        refuse_empty(sites, to)
    before = [_as_it_was(site) for site in sites]
    for name, selector in _named_selectors(asked, where, skip):
        require_match(selector, [*sites, *before], name)
    surroundings = Surroundings(model, example_inputs)
    steps = []
    for site, was in zip(sites, before, strict=True):
        target, reason = _decide(site, was, asked, where, skip)
        steps.append(
            Step(site, "leave", reason=reason)
            if target is None
            else _step(site, target, carry, surroundings)
        )
    made = Plan(model, steps)
    refuse_idle(made, to)
    refuse_unfaithful(made, strict=strict, min_fidelity=min_fidelity)
    return made


def _named_selectors(
    asked: Wanted, where: Selector | None, skip: Selector | None
) -> list[tuple[str, Selector]]:
    given = [("where", where), ("skip", skip), *(("to", key) for key in asked.selectors)]
    return [(name, selector) for name, selector in given if selector is not None]


def _as_it_was(site: NormSite) -> NormSite:
    """The site as it was before normswap first converted it."""
    record = record_of(site.module)
    if record is None:
        return site
    if isinstance(record.original, FunctionalNorm):
        owner, _, _ = site.path.rpartition(".")
        return replace(read_site(record.original, owner, site.names), origin=record.original.origin)
    return read_site(record.original, site.path, site.aliases)


def _decide(
    site: NormSite,
    was: NormSite,
    asked: Wanted,
    where: Selector | None,
    skip: Selector | None,
) -> tuple[Target | None, str]:
    """What the site is to become, or why nothing.

    What a site was counts too, where it is by now what is asked for: so the same call made twice
    equals the call made once.
    """

    def decide(view: NormSite) -> tuple[Target | None, str]:
        if skip is not None and matches(skip, view):
            return None, "left out by skip="
        if where is not None and not matches(where, view):
            return None, "not in where="
        return asked.of(view, where)

    if was is not site:
        target, _ = decide(was)
        if target is not None and target.settled(site.state).describes(site.state):
            return target, ""
    return decide(site)


def _step(site: NormSite, target: Target, carry: Carry, surroundings: Surroundings) -> Step:
    refuse_unready(site)
    if site.obstacle:
        return Step(site, "skip", target, reason=site.obstacle)
    try:
        target = target.settled(site.state)
        if target.describes(site.state):
            return Step(site, "already", target)
        state = surroundings.inform(site, target.needs)
        start = target.start(state, carry=carry)
        if start.rewrites_affine and surroundings.shares_affine(site):
            if carry == "fresh":
                raise CannotConvert(
                    "its affine is another layer's too, and would begin anew there as well",
                    'use carry="copy"',
                )
            start = target.start(state, carry="copy")
            note = "its affine is another layer's too, so it is copied"
            start = replace(start, note="; ".join(filter(None, (start.note, note))))
        refuse_taken_names(state, start)
        refuse_unread(surroundings.reads(site), site.module, state, start)
        start = _checked(site, state, start)
    except CannotConvert as error:
        return Step(site, "skip", target, reason=str(error))
    except OptionError as error:
        raise OptionError(f"{site.label}: {error}") from None
    return Step(site, "convert", target, start, state)


def _checked(site: NormSite, state: NormState, start: Start) -> Start:
    """Refuse a start that would pool over single values, or note that this is not known."""
    pool = start.pool
    same = pool == state.rule.train
    if pool is None or (same and pool.meets):
        return start
    for shape in site.input_shapes or ():
        sizes = list(shape)
        sizes.insert(1, sizes.pop(state.channel_dim))
        if pool.values(sizes[0], state.num_features, math.prod(sizes[2:])) <= 1:
            raise CannotConvert(
                f"on its input {shape} each statistic would be pooled over a single value",
                f"{_REMEDIES[pool.over]}, or leave it out by skip=",
            )
    if same or site.input_shapes is not None or pool.values(1, state.num_features, 1) > 1:
        return start
    unchecked = "pool size unchecked without example_inputs"
    return replace(start, note=f"{start.note}; {unchecked}" if start.note else unchecked)
