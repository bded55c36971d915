"""Making a plan happen, and taking it back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normswap.errors import StalePlan
from normswap.norms.base import Norm
from normswap.norms.furnish import furnish
from normswap.swap.carry import carry_over
from normswap.swap.changes import Changes
from normswap.swap.journal import (
    Record,
    Skip,
    keep,
    model_place,
    put_back,
    record_of,
    records,
    set_skips,
    skips,
)
from normswap.swap.plan import Plan, Step

__all__ = ["Applied", "apply_plan", "revert", "undo"]


@dataclass(frozen=True)
class Applied:
    """A plan that was made to happen.

    Args:
        model: the converted model.
        steps: each new norm with the record of the one step that put it there.
        skips_before: what earlier conversions had left, for taking this one back.
    """

    model: nn.Module
    steps: list[tuple[nn.Module, Record]]
    skips_before: dict[str, Skip]


def apply_plan(plan: Plan) -> Applied:
    """Build every new norm, then put them all in place at once.

    Raises:
        StalePlan: a norm of the plan is no longer where it was.
    """
    model = plan.model
    _refuse_stale(plan)
    changes = Changes()
    made = [(step, *_make(step, changes)) for step in plan.of("convert")]
    left = skips(model)
    converted = changes.make(model)
    # From here on nothing can fail: the model is converted and is told what was left.
    remembered = {path: skip for path, skip in left.items() if path in _paths(plan, "skip", "leave")}
    for step in plan.of("skip"):
        remembered[step.site.path] = Skip(type(step.site.module).__name__, str(step.to), step.reason)
    set_skips(converted, remembered)
    return Applied(converted, [(module, record) for _, module, record in made], left)


def revert(model: nn.Module) -> nn.Module:
    """Put every first original back; see `normswap.revert`."""
    found = [(module, record) for module, record in records(model).values()]
    return _take_back(model, found, {})


def undo(applied: Applied) -> nn.Module:
    """Take back one plan only: the model is as it was before it, conversions included."""
    present = {id(module) for module in applied.model.modules()}
    found = [(module, record) for module, record in applied.steps if id(module) in present]
    return _take_back(applied.model, found, applied.skips_before)


def _take_back(
    model: nn.Module, found: list[tuple[nn.Module, Record]], left: dict[str, Skip]
) -> nn.Module:
    place = model_place(model)
    changes = Changes()
    for module, record in found:
        put_back(module, record, place, changes)
    reverted = changes.make(model)
    set_skips(reverted, left)
    return reverted


def _make(step: Step, changes: Changes) -> tuple[nn.Module, Record]:
    """Build the new norm of a step, complete but for what it shares with the old one."""
    site, start, state, spec = step.site, step.start, step.state, step.to
    if start is None or state is None or spec is None:
        raise StalePlan(f"{site.label}: the step says nothing of what to make")
    old = site.module
    made = furnish(state, start)
    new = made.module
    if isinstance(new, Norm):
        new.path = site.path
    carry_over(old, new)
    changes.modules.append((old, new))
    for name, value in made.rewrites.items():
        changes.writes.append((getattr(old, name), value))
    for name, flag in made.requires_grad.items():
        changes.flags.append((getattr(old, name), flag))
    return new, keep(old, made, spec, start.fidelity, start.note)


def _refuse_stale(plan: Plan) -> None:
    present = dict(plan.model.named_modules(remove_duplicate=False))
    for step in plan.of("convert"):
        if present.get(step.site.path) is not step.site.module:
            raise StalePlan(
                f"{step.site.label} is no longer the module that the plan was made for; "
                "make a new plan"
            )


def _paths(plan: Plan, *actions: str) -> set[str]:
    return {step.site.path for step in plan if step.action in actions}
