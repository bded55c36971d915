"""Making a plan happen, and taking it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from normswap.errors import StalePlan
from normswap.graph.calls import own_class
from normswap.norms.base import Norm
from normswap.norms.functional import FunctionalNorm, owner_of, refer, referred
from normswap.norms.furnish import furnish
from normswap.norms.state import TENSORS
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
    remember_skips,
    skips,
)
from normswap.swap.lift import lifted_class
from normswap.swap.step import Step

__all__ = ["Applied", "apply_steps", "revert", "undo"]


@dataclass(frozen=True)
class Applied:
    """A plan that was made to happen.

    Args:
        model: the converted model.
        replaced: the norms that were taken out.
        skips_before: what earlier conversions had left, for taking this one back.
        changes: what was changed.
    """

    model: nn.Module
    replaced: list[nn.Module]
    skips_before: dict[str, Skip]
    changes: Changes

    @contextmanager
    def taken_back_on_failure(self) -> Iterator[None]:
        """If the block fails, the model is to the bit what it was before."""
        try:
            yield
        except BaseException:
            self.changes.take_back()
            raise


def apply_steps(model: nn.Module, steps: Iterable[Step], *, scoped: bool = False) -> Applied:
    """Build every new norm, then put them all in place at once.

    Args:
        model: the model that the steps were planned for.
        steps: what is to happen.
        scoped: let the new norms lead back to what stands there now, and no further.

    Raises:
        StalePlan: a norm of the plan is no longer where it was.
    """
    steps = list(steps)
    converting = [step for step in steps if step.action == "convert"]
    _refuse_stale(model, converting)
    changes = Changes()
    pending = Pending(changes)
    place = model_place(model)
    for step in converting:
        _make(step, changes, pending, place, scoped=scoped)
    before = skips(model)
    remember_skips(model, _skips_after(before, steps), changes)
    keep_in_step(model, changes)
    olds = [step.site.module for step in converting]
    return Applied(changes.make(model), olds, before, changes)


def _skips_after(before: dict[str, Skip], steps: list[Step]) -> dict[str, Skip]:
    """What there is to remember as left: what is still left of before, and what is now."""
    untouched = {step.site.path for step in steps if step.action == "leave"}
    after = {path: skip for path, skip in before.items() if path in untouched}
    for step in steps:
        if step.action == "skip":
            after[step.site.path] = Skip(step.site.source, str(step.to), step.reason)
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
    """Take back one scoped conversion, and all that came after it, but nothing before it."""
    olds = {id(old) for old in applied.replaced}
    found = [pair for pair in records(applied.model).values() if id(pair[1].original) in olds]
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
    remember_skips(model, left, changes)
    return changes.make(model)


def _make(step: Step, changes: Changes, pending: Pending, place: Tensor, *, scoped: bool) -> None:
    """Build the new norm of a step, complete but for what it shares with the old one."""
    site, start, state, spec = step.site, step.start, step.state, step.to
    if start is None or state is None or spec is None:
        raise StalePlan(f"{site.label}: the step says nothing of what to make")
    old = site.module
    made = furnish(state, start)
    new = made.module
    if isinstance(new, Norm):
        new.site_path = site.path
    carry_over(old, new)
    refers = old.refers if isinstance(old, FunctionalNorm) else referred(old)
    owner = site.owner or owner_of(old)
    if owner is not None:
        refer(new, {name: refers[name] for name in refers if name in made.carried}, owner)
    if isinstance(old, FunctionalNorm) and site.owner is not None:
        changes.lifts.append((site.owner, old.name, new, lifted_class(own_class(site.owner))))
    else:
        changes.modules.append((old, new))
    for name, value in made.rewrites.items():
        changes.writes.append((getattr(old, name), value))
    for name, flag in made.requires_grad.items():
        changes.flags.append((getattr(old, name), flag))
    kept = pending.add(start.beside) if start.beside else ()
    keep(old, made, spec, start.fidelity, start.note, place, beside=kept, scoped=scoped)


def _refuse_stale(model: nn.Module, converting: list[Step]) -> None:
    present = dict(model.named_modules(remove_duplicate=False))
    for step in converting:
        here = step.site.owner or step.site.module
        if present.get(step.site.path) is not here or _has_other_tensors(step):
            raise StalePlan(
                f"{step.site.label} is no longer the module that the plan was made for; "
                "make a new plan"
            )


def _has_other_tensors(step: Step) -> bool:
    """Whether the norm holds other tensors than those that were read for the plan."""
    for held in (step.site.module._parameters, step.site.module._buffers):
        for name in TENSORS:
            if held.get(name) is not None and held[name] is not getattr(step.state, name):
                return True
    return False
