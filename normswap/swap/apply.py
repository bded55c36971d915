"""Making a plan happen, and taking it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from normswap.errors import StalePlan
from normswap.norms.base import Norm
from normswap.norms.furnish import furnish
from normswap.swap.beside import Pending, restore
from normswap.swap.carry import carry_over
from normswap.swap.changes import Changes
from normswap.swap.fast_path import keep_in_step
from normswap.swap.journal import (
    Record,
    Skip,
    keep,
    model_place,
    put_back,
    records,
    set_skips,
    skips,
)
from normswap.swap.step import Step

__all__ = ["Applied", "apply_steps", "revert", "undo"]


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


def apply_steps(model: nn.Module, steps: Iterable[Step]) -> Applied:
    """Build every new norm, then put them all in place at once.

    Raises:
        StalePlan: a norm of the plan is no longer where it was.
    """
    steps = list(steps)
    converting = [step for step in steps if step.action == "convert"]
    _refuse_stale(model, converting)
    changes = Changes()
    pending = Pending(changes)
    made = [_make(step, changes, pending) for step in converting]
    before = skips(model)
    after = _skips_after(before, steps)
    keep_in_step(model, changes)
    converted = changes.make(model)
    set_skips(converted, after)
    return Applied(converted, made, before)


def _skips_after(before: dict[str, Skip], steps: list[Step]) -> dict[str, Skip]:
    """What there is to remember as left: what is still left of before, and what is now."""
    untouched = {step.site.path for step in steps if step.action == "leave"}
    after = {path: skip for path, skip in before.items() if path in untouched}
    for step in steps:
        if step.action == "skip":
            source = type(step.site.module).__name__
            after[step.site.path] = Skip(source, str(step.to), step.reason)
    return after


def revert(model: nn.Module) -> nn.Module:
    """Put every normalization back as it was before the first conversion.

    Classes, settings and hooks are the first original's, also after several conversions. Values
    that were carried unchanged keep what they have become; values that a start rewrote come back
    as they were, on the model's present device and in its present precision.

    Args:
        model: a model, any part of it, or a copy; one that was never converted stays as it is.

    Returns:
        The reverted model: the same object, unless the model itself was a norm.

    Raises:
        CannotRevert: a layer that a norm was folded into has been trained since.
    """
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
    restore((kept for _, record in found for kept in record.beside), changes)
    keep_in_step(model, changes)
    reverted = changes.make(model)
    set_skips(reverted, left)
    return reverted


def _make(step: Step, changes: Changes, pending: Pending) -> tuple[nn.Module, Record]:
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
    kept = pending.add(start.beside) if start.beside else ()
    return new, keep(old, made, spec, start.fidelity, start.note, kept)


def _refuse_stale(model: nn.Module, converting: list[Step]) -> None:
    present = dict(model.named_modules(remove_duplicate=False))
    for step in converting:
        if present.get(step.site.path) is not step.site.module:
            raise StalePlan(
                f"{step.site.label} is no longer the module that the plan was made for; "
                "make a new plan"
            )
