"""Making a plan happen, and taking it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from normswap.errors import StalePlan
from normswap.norms.base import Norm
from normswap.norms.functional import FunctionalNorm, owner_of, refer, referred
from normswap.norms.furnish import furnish
from normswap.norms.renamed import rename, whole
from normswap.norms.state import TENSORS
from normswap.swap.beside import Pending
from normswap.swap.carry import carry_over
from normswap.swap.changes import Changes
from normswap.swap.fast_path import keep_in_step
from normswap.swap.folding import keep_from_folding
from normswap.swap.handover import model_place
from normswap.swap.inputs import keep_asking
from normswap.swap.journal import (
    Record,
    Skip,
    keep,
    let_lapse,
    put_back,
    records,
    remember_skips,
    skips,
)
from normswap.swap.kept import restore
from normswap.swap.references import keep_references
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
    _follow(model, changes)
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
    restore(model, (kept for _, record in found for kept in record.beside), changes)
    _follow(model, changes)
    remember_skips(model, left, changes)
    return changes.make(model)


def _follow(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` what has to follow its replacements in the model around them."""
    for keep_up in (keep_in_step, keep_from_folding, keep_references, keep_asking):
        keep_up(model, changes)


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
    names = {name: held for name, held in state.names.items() if name in made.carried}
    carry_over(old, new, leave={*state.names.values(), *state.own} - set(names.values()))
    rename(new, names, old)
    refers = old.refers if isinstance(old, FunctionalNorm) else referred(old)
    owner = site.owner or owner_of(old)
    if owner is not None:
        refer(new, {name: refers[name] for name in refers if name in made.carried}, owner)
    if isinstance(old, FunctionalNorm) and site.owner is not None:
        changes.children.append((site.owner, old.name, new))
    else:
        changes.modules.append((old, new))
    for name, value in made.rewrites.items():
        changes.writes.append((getattr(state, name), value))
    for name, flag in made.requires_grad.items():
        changes.flags.append((whole(getattr(state, name)), flag))
    if not scoped:
        let_lapse(old, changes)
    kept = tuple(kept for beside in start.beside for kept in pending.add(beside))
    keep(old, made, state, spec, start, place, beside=kept, scoped=scoped)


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
    called = {} if step.state is None else step.state.names
    for held in (step.site.module._parameters, step.site.module._buffers):
        for name in TENSORS:
            now, read = held.get(called.get(name, name)), getattr(step.state, name)
            if now is not None and now is not read and now is not read._base:
                return True
    return False
