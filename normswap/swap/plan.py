"""What would happen to every normalization of a model, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap.errors import (
    CannotConvert,
    NothingToConvert,
    OptionError,
    TooUnfaithful,
)
from normswap.graph.modules import read_site, walk
from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.registry import NormSpec, spec
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState
from normswap.swap.guards import refuse_unready, refuse_unsupported
from normswap.swap.journal import model_place, record_of
from normswap.swap.select import Selector, matches, require_match
from normswap.table import render

__all__ = ["Plan", "Step", "Target", "make_plan"]

#: A name, a spec, or an ordered mapping of selectors to these, where ``None`` leaves alone.
Target = Union[str, NormSpec, Mapping[Any, Union[str, NormSpec, None]]]

Action = Literal["convert", "already", "skip", "leave"]


@dataclass(frozen=True)
class Step:
    """What is to happen to one site.

    Args:
        site: the normalization.
        action: ``"convert"``; ``"already"``: it is what was asked for; ``"skip"``: it was chosen
            but cannot be converted; ``"leave"``: it was not chosen.
        to: what it is to become.
        start: how, if it is to be converted.
        state: the site's state, completed from its surroundings, that the start was made for.
        reason: why it is skipped or left.
    """

    site: NormSite
    action: Action
    to: NormSpec | None = None
    start: Start | None = None
    state: NormState | None = None
    reason: str = ""

    @property
    def fidelity(self) -> Fidelity | None:
        """How faithful the outcome is; ``None`` where nothing is asked of the site."""
        if self.action == "already":
            return Fidelity.EXACT
        return self.start.fidelity if self.start else None

    @property
    def note(self) -> str:
        """What there is to say about it."""
        return self.reason or (self.start.note if self.start else "")


class Plan(Sequence[Step]):
    """What is to happen to every normalization of a model, in order; prints as a table.

    ``apply()`` makes it happen.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Step]) -> None:
        self.model = model
        self._steps = tuple(steps)

    def __getitem__(self, index: Any) -> Any:
        """One step, or a tuple of them for a slice."""
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def of(self, *actions: Action) -> list[Step]:
        """The steps with one of these actions."""
        return [step for step in self if step.action in actions]

    def apply(self) -> nn.Module:
        """Make it happen: all of it, or on any exception nothing.

        Returns:
            The model, or its replacement where the model itself is a norm.

        Raises:
            StalePlan: the model's norms are no longer those that the plan was made for.
        """
        from normswap.swap.apply import apply_plan

        return apply_plan(self).model

    def __repr__(self) -> str:
        return f"<Plan: {self._summary()}>"

    def _summary(self) -> str:
        counts = {action: len(self.of(action)) for action in ("convert", "already", "skip", "leave")}
        return ", ".join(f"{count} {action}" for action, count in counts.items() if count)

    def __str__(self) -> str:
        return render(
            "Plan",
            ("path", "from", "action", "to", "fidelity", "note"),
            (
                (
                    step.site.path or "(the model itself)",
                    type(step.site.module).__name__,
                    step.action,
                    step.to or "",
                    step.fidelity or "",
                    step.note,
                )
                for step in self
            ),
            footer=self._summary(),
        )


def make_plan(
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
    """Plan a conversion; see `normswap.plan`."""
    refuse_unsupported(model)
    if carry not in ("auto", "copy", "fresh"):
        raise OptionError(f'carry={carry!r} is none of "auto", "copy", "fresh"')
    wanted = _targets(to, options)
    sites = list(walk(model, example_inputs))
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
    plan = Plan(model, steps)
    _refuse_empty(plan, to)
    if strict or min_fidelity is not None:
        _refuse_unfaithful(plan, strict=strict, least=_fidelity(min_fidelity))
    return plan


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
        return matches(selector, site) or (
            target.describes(site.state) and matches(selector, was)
        )

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


def _step(
    site: NormSite, target: NormSpec, carry: Carry, place: Any, model: nn.Module
) -> Step:
    refuse_unready(site)
    if site.obstacle:
        return Step(site, "skip", target, reason=site.obstacle)
    if target.describes(site.state):
        return Step(site, "already", target)
    try:
        state = _informed(site, target, place, model)
        start = target.start(state, carry=carry)
        _refuse_degenerate(site, state, start)
    except CannotConvert as error:
        return Step(site, "skip", target, reason=str(error))
    except OptionError as error:
        raise OptionError(f"{site.label}: {error}") from None
    return Step(site, "convert", target, start, state)


def _informed(site: NormSite, target: NormSpec, place: Any, model: nn.Module) -> NormState:
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


def _refuse_degenerate(site: NormSite, state: NormState, start: Start) -> None:
    if start.pool is None or start.pool == state.rule.train:
        return
    for shape in site.input_shapes or ():
        sizes = list(shape)
        sizes.insert(1, sizes.pop(state.channel_dim))
        length = 1
        for size in sizes[2:]:
            length *= size
        if start.pool.values(sizes[0], state.num_features, length) <= 1:
            raise CannotConvert(
                f"on its input {shape} each statistic would be pooled over a single value",
                "use fewer groups, larger inputs, or leave it out by skip=",
            )


def _refuse_empty(plan: Plan, to: Target) -> None:
    if plan.of("convert", "already"):
        return
    skipped = plan.of("skip")
    if skipped:
        raise NothingToConvert(
            f"not one of the chosen normalizations can become {to!s}:\n" + _listed(skipped)
        )
    counts: dict[str, int] = {}
    for step in plan:
        counts[step.site.kind] = counts.get(step.site.kind, 0) + 1
    if not counts:
        raise NothingToConvert("the model has no normalization that normswap knows")
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    first = next(iter(counts))
    raise NothingToConvert(
        f"nothing to convert to {to!s}: the model has {kinds}. Select what to convert, for "
        f'instance where="kind:{first}", or where="*" for everything'
    )


def _refuse_unfaithful(plan: Plan, *, strict: bool, least: Fidelity | None) -> None:
    skipped = plan.of("skip")
    if skipped:
        raise TooUnfaithful(
            "some of the chosen normalizations cannot be converted:\n" + _listed(skipped)
        )
    if least is None:
        return
    worse = [step for step in plan if step.fidelity and step.fidelity.rank > least.rank]
    if worse:
        raise TooUnfaithful(
            f"min_fidelity={least.value!r} cannot be kept; leave these out by skip=, "
            "or accept less:\n" + _listed(worse)
        )


def _fidelity(name: str | Fidelity | None) -> Fidelity | None:
    if name is None:
        return None
    try:
        return Fidelity(name)
    except ValueError:
        raise OptionError(
            f"min_fidelity={name!r} is none of {', '.join(f.value for f in Fidelity)}"
        ) from None


def _listed(steps: list[Step], most: int = 8) -> str:
    lines = [
        f"  {step.site.label}: {step.reason or f'only {step.fidelity}'}" for step in steps[:most]
    ]
    if len(steps) > most:
        lines.append(f"  ... and {len(steps) - most} more")
    return "\n".join(lines)
