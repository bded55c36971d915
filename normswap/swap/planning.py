"""Deciding what happens to every normalization of a model, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normswap.errors import CannotConvert, OptionError
from normswap.graph.modules import find, read_site
from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.registry import NormSpec, spec
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState
from normswap.swap.demands import refuse_empty, refuse_idle, refuse_unfaithful
from normswap.swap.guards import refuse_unready, refuse_unsupported
from normswap.swap.journal import model_place, record_of
from normswap.swap.plan import Plan
from normswap.swap.select import Selector, matches, require_match
from normswap.swap.step import Step

__all__ = ["Target", "plan"]

#: A name, a spec, or an ordered mapping of selectors to these, where ``None`` leaves alone.
Target = str | NormSpec | Mapping[Any, str | NormSpec | None]


def plan(
    model: nn.Module,
    to: Target,
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
        to: a norm's name, a `normswap.spec`, or an ordered mapping of selectors to these, of
            which the first that matches wins and ``None`` leaves alone.
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
    wanted = _targets(to, options)
    sites = list(find(model, example_inputs))
    refuse_empty(sites, to)
    before = [_as_it_was(site) for site in sites]
    for selector, name in ((where, "where"), (skip, "skip"), *((key, "to") for key, _ in wanted)):
        if selector is not None:
            require_match(selector, [*sites, *before], name)
    place = model_place(model)
    steps = []
    for site, was in zip(sites, before, strict=True):
        target, reason = _choose(site, was, wanted, where, skip)
        steps.append(
            Step(site, "leave", reason=reason)
            if target is None
            else _step(site, target, carry, place, model)
        )
    made = Plan(model, steps)
    refuse_idle(made, to)
    if strict or min_fidelity is not None:
        refuse_unfaithful(made, min_fidelity)
    return made


def _targets(to: Target, options: dict[str, Any]) -> list[tuple[Selector | None, NormSpec | None]]:
    """``to`` as selectors with specs, in the order in which they are tried."""
    if not isinstance(to, Mapping):
        return [(None, _spec(to, options))]
    return [(key, None if value is None else _spec(value, options)) for key, value in to.items()]


def _spec(to: Any, options: dict[str, Any]) -> NormSpec:
    if isinstance(to, NormSpec):
        return spec(to.name, **{**to.options, **options})
    return spec(to, **options)


def _as_it_was(site: NormSite) -> NormSite:
    """The site as it was before normswap first converted it."""
    record = record_of(site.module)
    if record is None:
        return site
    return replace(read_site(record.original, site.path, site.aliases))


def _choose(
    site: NormSite,
    was: NormSite,
    wanted: list[tuple[Selector | None, NormSpec | None]],
    where: Selector | None,
    skip: Selector | None,
) -> tuple[NormSpec | None, str]:
    """What the site is to become, or why nothing.

    What a site was counts too, where it is by now what is asked for: so the same call made twice
    equals the call made once.
    """

    def chosen(selector: Selector, target: NormSpec) -> bool:
        return matches(selector, site) or (target.describes(site.state) and matches(selector, was))

    if skip is not None and matches(skip, site):
        return None, "left out by skip="
    for key, target in wanted:
        if target is None:
            if key is not None and matches(key, site):
                return None, "left out by the mapping"
            continue
        if key is not None:
            if not chosen(key, target):
                continue
            if where is not None and not chosen(where, target):
                return None, "not in where="
            return target, ""
        if where is not None:
            return (target, "") if chosen(where, target) else (None, "not in where=")
        if site.kind in target.entry.sources or target.describes(site.state):
            return target, ""
        return None, f"{site.kind} is not a source of {target.name}; select it by where="
    return None, "not in the mapping"


def _step(site: NormSite, target: NormSpec, carry: Carry, place: Tensor, model: nn.Module) -> Step:
    refuse_unready(site)
    if site.obstacle:
        return Step(site, "skip", target, reason=site.obstacle)
    if target.describes(site.state):
        return Step(site, "already", target)
    try:
        state = _informed(site, target, place, model)
        start = _checked(site, state, target.start(state, carry=carry))
    except CannotConvert as error:
        return Step(site, "skip", target, reason=str(error))
    except OptionError as error:
        raise OptionError(f"{site.label}: {error}") from None
    return Step(site, "convert", target, start, state)


def _informed(site: NormSite, target: NormSpec, place: Tensor, model: nn.Module) -> NormState:
    """The site's state with what only its surroundings tell."""
    state = replace(site.state, like=place)
    if "dim" in target.entry.needs and state.dim is None and state.channel_dim == 1:
        state = replace(state, dim=_dimension(site, model))
    return state


def _dimension(site: NormSite, model: nn.Module) -> int | None:
    """How many dimensions follow the channels, from example inputs or the producing convolution."""
    if site.input_shape is not None:
        return max(len(site.input_shape) - 2, 1)
    producer = model.get_submodule(site.producer) if site.producer else None
    return len(producer.kernel_size) if isinstance(producer, _ConvNd) else None


def _checked(site: NormSite, state: NormState, start: Start) -> Start:
    """Refuse a start that would pool over single values, or note that this is not known."""
    pool = start.pool
    if pool is None or pool == state.rule.train:
        return start
    for shape in site.input_shapes or ():
        sizes = list(shape)
        sizes.insert(1, sizes.pop(state.channel_dim))
        if pool.values(sizes[0], state.num_features, math.prod(sizes[2:])) <= 1:
            raise CannotConvert(
                f"on its input {shape} each statistic would be pooled over a single value",
                "use fewer groups, larger inputs, or leave it out by skip=",
            )
    if site.input_shapes is not None or pool.values(1, state.num_features, 1) > 1:
        return start
    unchecked = "pool size unchecked without example_inputs"
    return replace(start, note=f"{start.note}; {unchecked}" if start.note else unchecked)
