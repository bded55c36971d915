"""How a target starts from a source: with what fidelity, in which shell, with which affine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.beside import Beside
from normswap.norms.counts import PLAIN, Counts
from normswap.norms.fidelity import Fidelity
from normswap.norms.pool import RUNNING, Curve, Pool, Rule
from normswap.norms.precision import precise
from normswap.norms.state import AFFINE_TENSORS, RUNNING_STATISTICS, NormState

__all__ = ["Carry", "Start", "begin"]

Carry = Literal["auto", "copy", "fresh"]

#: Where weight and bias may have to be rewritten for what is promised.
_REWRITING = (Fidelity.EXACT, Fidelity.EVAL, Fidelity.NEAR, Fidelity.MATCHED)

#: From which share of the running statistics on a mixture evaluates nearly as they alone do.
NEAR = 0.999


@dataclass(frozen=True)
class Start:
    """A starter's answer: everything that is known before anything is built.

    Args:
        fidelity: how faithful the new norm starts.
        shell: makes the module, with its class and settings but without the tensors below.
        affine: which of ``weight`` and ``bias`` it takes.
        running: names of the running statistics that it takes.
        frozen: whether the affine is to be held fixed.
        values: new values, by name, computed when asked for: for ``weight`` and ``bias``, which
            keep the source's values if left out, and for tensors that the shell has of its own.
        note: what the user should know, for the plan and the report.
        fresh: whether the running statistics begin anew although the source has some.
        pool: what is pooled when the norm measures its input.
        kept: values of running statistics that the shell keeps in terms of its own, by name.
        beside: what has to change outside of the norm.
    """

    fidelity: Fidelity
    shell: Callable[[], nn.Module]
    affine: tuple[str, ...]
    running: tuple[str, ...]
    values: Callable[[], Mapping[str, Tensor]]
    frozen: bool = False
    note: str = ""
    fresh: bool = False
    pool: Pool | None = None
    kept: Callable[[], Mapping[str, Tensor]] = dict
    beside: tuple[Beside, ...] = ()

    def noted(self, note: str) -> Start:
        """The same with something more to say."""
        return replace(self, note="; ".join(filter(None, (self.note, note))))

    def affine_of(self, state: NormState) -> tuple[Tensor, Tensor]:
        """Weight and bias that a norm starts with in a source's place, (C,) each, precisely."""
        values = dict(self.values())
        one = precise(state.reference().new_ones(state.num_features))
        made = []
        for name, neutral in zip(AFFINE_TENSORS, (one, torch.zeros_like(one)), strict=True):
            own = values.get(name, getattr(state, name)) if name in self.affine else None
            made.append(neutral if own is None else precise(own))
        return made[0], made[1]

    @property
    def rewrites_affine(self) -> bool:
        """Whether weight or bias, which the source also holds, get other values."""
        return bool(self.affine) and self.values is not dict


def begin(
    state: NormState,
    shell: Callable[[], nn.Module],
    rule: Rule,
    *,
    carry: Carry,
    eps: float | None = None,
    affine: bool | None = None,
    running: bool = False,
    frozen: bool = False,
    note: str = "",
    counts: Counts = PLAIN,
    own: tuple[str, ...] = (),
    kept: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Start:
    """Answer for a norm whose output is ``weight · (x - mean) / sqrt(var + eps) + bias``.

    The fidelity follows from the two rules alone: the same rule is the same function, the same
    evaluation rule the same function in eval mode, and a source that evaluates with running
    statistics tells what the target is expected to measure, so that the affine can be matched.

    Args:
        state: the source.
        shell: makes the target's module.
        rule: what the target pools over.
        carry: ``"auto"``, ``"copy"`` or ``"fresh"``.
        eps: the target's eps; ``None`` is the source's.
        affine: whether the target has weight and bias; ``None`` is as the source, and yes where
            the start needs them.
        running: whether the target tracks running statistics.
        frozen: whether the target holds its affine fixed.
        note: what the user should know.
        counts: how weight and bias enter the target, as it starts.
        own: parameters that the target has beside weight and bias, and learns.
        kept: gives the source's running statistics in the terms in which the target keeps them,
            where those are not the shared ones.

    Raises:
        CannotConvert: the affine is not per channel, or has to be rewritten and cannot be.
    """
    eps = state.eps if eps is None else eps
    fidelity = _fidelity(state, rule, counts, carry=carry, eps=eps, affine=affine)
    if state.obstacle and fidelity is not Fidelity.FRESH:
        remedy = 'convert it with carry="fresh" or leave it out by skip='
        raise CannotConvert(state.obstacle, remedy)
    values: Callable[[], Mapping[str, Tensor]] = dict
    names = () if affine is False else _affine_of(state)
    # Where nothing was standardized there is no affine to go by, and norms usually have one.
    if not names and (affine or (affine is None and state.rule.eval.over == "nothing")):
        names = AFFINE_TENSORS
    if carry == "fresh":
        values = partial(_unit, state)
    elif carry == "auto" and _to_be_matched(state, rule, fidelity, eps):
        names = AFFINE_TENSORS
        values = partial(_match, state, rule.eval, eps, counts)
    elif carry == "auto" and _to_be_recounted(state, fidelity, counts):
        names = _recounted(state, counts)
        values = partial(_recount, state, counts, names)
    if state.parametrized and values is not dict:
        raise CannotConvert(
            "its weight is parametrized, so the start cannot rewrite it",
            'use carry="copy", or remove the parametrization first',
        )
    notes = [note] if note else []
    if fidelity is Fidelity.NEAR:
        rest = 1 - _share(state, rule)
        notes.append(f"all but {rest:.1g} of its statistics are the running ones")
    if running and state.kind and (carry == "fresh" or not state.tracks):
        notes.append("running statistics begin at 0 and 1: run normswap.warmup")
    known = state.tracks and carry != "fresh"
    if kept is not None and state.kind and not known:
        notes.append("running statistics begin anew: train before evaluating")
    gained = [*(name for name in names if getattr(state, name) is None), *own]
    if state.kind and gained:
        notes.append(f"gains {', '.join(gained)}, which no optimizer knows yet")
    return Start(
        fidelity=fidelity,
        shell=shell,
        affine=names,
        running=RUNNING_STATISTICS if running else (),
        values=values,
        frozen=frozen,
        note="; ".join(notes),
        fresh=carry == "fresh",
        pool=rule.train if rule.train.measures else None,
        kept=kept if kept is not None and known else dict,
    )


def _to_be_matched(state: NormState, rule: Rule, fidelity: Fidelity, eps: float) -> bool:
    """Whether gain and offset have to become others for what is promised."""
    same = fidelity is Fidelity.NEAR or rule.eval == state.rule.eval
    return fidelity in _REWRITING and not (same or _is_identity(rule.eval, state, eps))


def _to_be_recounted(state: NormState, fidelity: Fidelity, counts: Counts) -> bool:
    """Whether weight and bias enter otherwise, so that as they are they mean something else.

    A source's that are plain are copied as they are where no more than that is promised.
    """
    promised = fidelity in _REWRITING
    meant = fidelity is Fidelity.AFFINE and state.counts != PLAIN
    return counts != state.counts and (promised or meant)


def _recounted(state: NormState, counts: Counts) -> tuple[str, ...]:
    """What has to be there for the same gain and offset where weight and bias enter otherwise.

    A source with neither gains both, as by ``affine=True``, or none.
    """
    theirs = state.counts
    gain = (theirs.of_weight, theirs.base) != (counts.of_weight, counts.base)
    offset = theirs.added != counts.added
    if not state.affine:
        return AFFINE_TENSORS if gain or offset else ()
    needed = zip(AFFINE_TENSORS, (gain, offset), strict=True)
    return tuple(name for name, n in needed if n or getattr(state, name) is not None)


def _affine_of(state: NormState) -> tuple[str, ...]:
    return tuple(name for name in AFFINE_TENSORS if getattr(state, name) is not None)


def _fidelity(
    state: NormState,
    rule: Rule,
    counts: Counts,
    *,
    carry: Carry,
    eps: float,
    affine: bool | None,
) -> Fidelity:
    if carry == "fresh" or (state.affine and affine is False):
        return Fidelity.FRESH
    rewritable = carry == "auto" and affine is not False
    same = counts == state.counts or rewritable
    if eps == state.eps and same:
        if rule == state.rule:
            return Fidelity.EXACT
        if rule.eval == state.rule.eval:
            return Fidelity.EVAL
    if "nothing" in (rule.eval.over, state.rule.eval.over):
        return Fidelity.FRESH
    if eps == state.eps and _share(state, rule) >= NEAR and same:
        return Fidelity.NEAR
    known = state.tracks and state.rule.eval.over in ("running", "mixture")
    ours, theirs = rule.eval, state.rule.eval
    representable = ours.over == "running" or (isinstance(ours, Curve) and ours.linear)
    if known and rewritable and eps == state.eps and theirs.over == "running" and representable:
        always = rule.train == ours and state.rule.train == theirs
        return Fidelity.EXACT if always else Fidelity.EVAL
    otherwise = ours.over == "running" and ours != theirs
    expects = ours.measures or ours.over == "curve" or otherwise
    matchable = known and (expects or theirs.over == "mixture")
    if matchable and (rewritable or (carry == "auto" and _is_identity(ours, state, eps))):
        return Fidelity.MATCHED
    return Fidelity.AFFINE


def _is_identity(pool: Pool, state: NormState, eps: float) -> bool:
    """Whether matching would change nothing: the channel's own statistics, the same eps."""
    return eps == state.eps and pool.by_channel and state.rule.eval.by_channel


def _share(state: NormState, rule: Rule) -> float:
    """How much of one norm's statistics, in eval mode, are those that the other goes by."""
    ours, theirs = rule.eval, state.rule.eval
    return max(ours.share(theirs), theirs.share(ours)) if RUNNING in (ours, theirs) else 0.0


def _unit(state: NormState) -> dict[str, Tensor]:
    """Unit gain and zero offset for what the source has of them per channel."""
    values = {}
    for name, make in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        own = getattr(state, name)
        if own is not None and own.shape == (state.num_features,):
            values[name] = make(own)
    return values


def _recount(state: NormState, counts: Counts, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same gain and offset where weight and bias enter otherwise."""
    entering = _entering(state, counts, *state.gain_and_offset())
    return {name: entering[name] for name in names}


def _match(state: NormState, pool: Pool, eps: float, counts: Counts) -> dict[str, Tensor]:
    """Gain and offset that give the source's eval output on a sample of expected statistics.

    With expected mean M and variance V of the pool, and the source's root S = sqrt(var + eps):
    weight' = weight · sqrt(V + eps') / S and bias' = bias + weight · (M - mean) / S. Mean and var
    are the running statistics, or what a source that measures is expected to make of them.
    """
    if state.running_mean is None or state.running_var is None:
        raise CannotConvert("it keeps no running statistics", 'use carry="copy"')
    if state.running_mean.is_meta:  # without values there is nothing to match, only to shape
        return {name: torch.empty_like(state.reference()) for name in AFFINE_TENSORS}
    mean, var = precise(state.running_mean), precise(state.running_var)
    gain, offset = state.gain_and_offset()
    expected_mean, expected_var = pool.expected(mean, var)
    mean, var = state.rule.eval.expected(mean, var)
    slope = gain / state.rule.eval.divisor(var, state.eps)
    gain = slope * pool.divisor(expected_var, eps)
    return _entering(state, counts, gain, offset + slope * (expected_mean - mean))


def _entering(state: NormState, counts: Counts, gain: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Weight and bias that make a gain and an offset, in the source's precision."""
    made = zip(AFFINE_TENSORS, counts.undone(gain, offset), strict=True)
    return {name: value.to(state.reference().dtype) for name, value in made}
