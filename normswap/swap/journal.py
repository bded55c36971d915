"""What a converted model remembers: on each new norm what it replaced, and how to go back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normswap.graph.modules import require_module
from normswap.norms.fidelity import Fidelity
from normswap.norms.functional import FunctionalNorm, owner_of, recall, refresh
from normswap.norms.furnish import Furnished
from normswap.norms.spec import NormSpec, Target
from normswap.norms.start import Start
from normswap.norms.state import NormState
from normswap.swap.carry import share_hooks
from normswap.swap.changes import ABSENT, Changes
from normswap.swap.handover import anchor, follow, hand_over, lent, take_back, tensor_of
from normswap.swap.kept import Kept

__all__ = [
    "Record",
    "Skip",
    "keep",
    "let_lapse",
    "put_back",
    "record_of",
    "records",
    "remember_fit",
    "remember_skips",
    "skips",
]

_RECORD = "_normswap_record"
_SKIPS = "_normswap_skips"


@dataclass(frozen=True)
class Record:
    """How a norm came to be where it is.

    It lies on the norm that it speaks of, outside its state dict, so that it goes wherever the
    norm goes: into copies, pickles and other models.

    Args:
        original: the module that stood here before the first conversion.
        spec: what the norm was asked to be; the name of a class that is not registered.
        fidelity: how faithfully it started.
        note: what was worth saying about it.
        carried: names of tensors that are still the original's own.
        names: what the original calls tensors, by their names here, where it calls them otherwise.
        lent: what the original calls parameters that children of the norm hold, by their paths.
        saved: values that a start rewrote, by the tensor's name, as they were.
        flags: ``requires_grad`` of tensors that a start froze, by name, as it was.
        dtype: floating-point type of the norm, or of the model, when it was put in place.
        beside: what a start changed outside of the norm, as it was.
    """

    original: nn.Module
    spec: NormSpec | str
    fidelity: Fidelity
    note: str
    carried: frozenset[str]
    names: Mapping[str, str] = field(default_factory=dict)
    lent: Mapping[str, str] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    beside: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A site that a conversion had to leave as it was: what it is, what was asked, why not."""

    source: str
    to: str
    reason: str


def record_of(module: nn.Module) -> Record | None:
    """The record of a norm that a conversion put in place, or ``None``."""
    return vars(module).get(_RECORD)


def records(model: nn.Module) -> dict[str, tuple[nn.Module, Record]]:
    """Every norm that a conversion put into a model, with its record, by path."""
    require_module(model)
    found = ((path, module, record_of(module)) for path, module in model.named_modules())
    return {path: (module, record) for path, module, record in found if record is not None}


def skips(model: nn.Module) -> dict[str, Skip]:
    """What conversions of this model had to leave as it was, by path."""
    return dict(vars(model).get(_SKIPS, {}))


def remember_skips(model: nn.Module, left: Mapping[str, Skip], changes: Changes) -> None:
    """Add to ``changes`` that a model remembers what was left, or forgets it if nothing was."""
    root = next((new for old, new in changes.modules if old is model), model)
    if left or _SKIPS in vars(root):
        changes.attributes.append((root, _SKIPS, dict(left) if left else ABSENT))


def keep(
    old: nn.Module,
    made: Furnished,
    state: NormState,
    spec: Target,
    start: Start,
    place: Tensor,
    *,
    beside: tuple[Kept, ...] = (),
    scoped: bool = False,
) -> Record:
    """Write the record of a new norm onto it; a chain of conversions leads to the first original.

    Args:
        old: the module that is being replaced.
        made: the new norm.
        state: what was read from ``old``.
        spec: what it was asked to be.
        start: how it starts.
        place: a tensor of the model, for the precision of a norm that has none of its own.
        beside: what it changes outside of the norm, as it is.
        scoped: let it lead back to ``old`` only, whatever was before that.

    Returns:
        The record of this one step, whose original is ``old``.
    """
    step = Record(
        original=old,
        spec=spec if isinstance(spec, NormSpec) else spec.name,
        fidelity=start.fidelity,
        note=start.note,
        carried=made.carried,
        names=dict(state.names),
        lent=lent(made.module, old, state.own),
        saved={name: tensor_of(state, name).detach().clone() for name in made.rewrites},
        flags={
            name: not flag
            for name, flag in made.requires_grad.items()
            if tensor_of(state, name).requires_grad != flag
        },
        dtype=anchor(made.module, place).dtype,
        beside=beside,
    )
    earlier = record_of(old)
    if earlier is None or scoped:
        vars(made.module)[_RECORD] = step
    else:
        vars(made.module)[_RECORD] = _chain(earlier, step, made)
    return step


def _chain(earlier: Record, step: Record, made: Furnished) -> Record:
    """The record that leads over two steps at once."""
    gone = earlier.carried - made.carried
    hand_over(earlier.original, step.original, _held(earlier, gone))
    take_back(earlier.original, step.original, earlier.lent)
    flags = dict(step.flags) | dict(earlier.flags)
    return replace(
        step,
        original=earlier.original,
        carried=earlier.carried & step.carried,
        names=earlier.names,
        lent=earlier.lent,
        saved={k: v for k, v in step.saved.items() if k in earlier.carried} | dict(earlier.saved),
        flags={k: flag for k, flag in flags.items() if made.requires_grad.get(k) != flag},
        dtype=earlier.dtype,
        beside=(*(kept for kept in earlier.beside if not kept.lapses), *step.beside),
    )


def remember_fit(
    norm: nn.Module, values: Mapping[str, Tensor], note: str, changes: Changes
) -> None:
    """Add to ``changes`` that a converted norm's tensors get values fitted on data.

    Tensors that are still the original's come back by a revert as they are now.

    Args:
        norm: a norm that a conversion put in place.
        values: new values by the tensor's name.
        note: what to say of the fit.
        changes: where the changes are collected.
    """
    record: Record = vars(norm)[_RECORD]
    rewritten = {
        name: tensor_of(norm, name).detach().clone()
        for name in values
        if name in record.carried and name not in record.saved
    }
    for name, value in values.items():
        changes.writes.append((tensor_of(norm, name), value))
    fitted = replace(
        record,
        fidelity=Fidelity.CALIBRATED,
        note=note,
        saved=dict(record.saved) | rewritten,
    )
    changes.attributes.append((norm, _RECORD, fitted))


def let_lapse(norm: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` that what was changed for a norm alone goes back, as the norm leaves."""
    record = record_of(norm)
    for kept in record.beside if record else ():
        if kept.lapses:
            kept.restore(changes, latest=True)


def put_back(current: nn.Module, record: Record, place: Tensor, changes: Changes) -> None:
    """Add to ``changes`` what brings a record's original back in the place of ``current``.

    Tensors that both hold go back with the values they have now, unless a start rewrote them;
    what the conversion had put aside follows to where the model is now.

    Args:
        current: the norm in the model.
        record: what it replaced, and what was carried and saved.
        place: a tensor of the model, for the device where the norm has none of its own.
        changes: where the changes are collected.
    """
    original = record.original
    owner = owner_of(current)
    if isinstance(original, FunctionalNorm) and owner is not None:
        recall(original, owner)
    refresh(current)
    carried = _held(record, record.carried)
    hand_over(original, current, carried)
    back = take_back(original, current, record.lent)
    here = anchor(current, place)
    dtype = None if here.dtype == record.dtype else here.dtype
    follow(original, here.device, dtype, skip=carried | back)
    original.training = current.training
    share_hooks(current, original)
    if isinstance(original, FunctionalNorm):
        changes.lowered.append(current)
    else:
        changes.modules.append((current, original))
    for name, value in record.saved.items():
        tensor = tensor_of(original, record.names.get(name, name))
        if not value.is_meta or tensor.is_meta:  # a model that was without weights has some now
            changes.writes.append((tensor, value.to(tensor).view_as(tensor)))
    for name, flag in record.flags.items():
        changes.flags.append((tensor_of(original, record.names.get(name, name)), flag))


def _held(record: Record, names: frozenset[str]) -> frozenset[str]:
    """What the original, and what keeps its keys, call these tensors."""
    return frozenset(record.names.get(name, name) for name in names)
