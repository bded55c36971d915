"""Trying whether forwards that run side by side leave each other alone.

While one waits at a norm, others run. What it keeps on the model meanwhile, such as a feature
that a hook stores for later, may be theirs when it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from normswap.randomness import kept_random_state, torch_states
from normswap.stats.accumulate import Batch
from normswap.stats.feed import batch_size, mapped
from normswap.stats.lockstep import Key
from normswap.stats.strand import Strand

__all__ = ["Trial", "rounding", "shows_alone"]

#: As many samples of a batch do for a trial, which is a first look only.
FEW = 1

#: Makes of a batch its forward, which has not begun.
Make = Callable[[Any], Callable[[], object]]


class Trial:
    """Looks at the first two batches of a pass.

    A few samples of each are run, or all where the model does not take few; each norm uses the
    statistics of these. A model that fails, or draws random numbers, cannot be judged and passes.

    Args:
        make: makes of a batch its forward.
        tolerance: how far statistics may differ, relative to their size.
    """

    def __init__(self, make: Make, tolerance: float) -> None:
        self._make = make
        self._tolerance = tolerance
        self._first: list[Any] | None = []

    def fails(self, batch: Any) -> bool:
        """Look at a batch; whether it shows that forwards disturb each other."""
        if self._first is None or not batch_size(batch):
            return False
        if not self._first:
            self._first.append(mapped(batch, Tensor.clone))
            return False
        first, self._first = self._first.pop(), None
        with kept_random_state():
            return self._disturb(first, batch)

    def _disturb(self, first: Any, second: Any) -> bool:
        """Whether a batch's forward brings other things when another runs while it waits."""
        before = torch_states()
        for size in (FEW, None):
            one, other = (partial(self._make, _beginning(each, size)) for each in (first, second))
            try:
                alone = _brought_by_first(one())
            except Exception:
                continue
            if not all(map(torch.equal, before, torch_states())):
                return False
            try:
                beside = _brought_by_first(one(), other())
            except Exception:
                if _fails(other):
                    continue
                return True
            same = map(partial(_same, self._tolerance), alone, beside)
            return len(alone) != len(beside) or not all(same)
        return False


def rounding(dtypes: Iterable[torch.dtype], *, amp: bool) -> float:
    """What two runs of the same may differ by: half of the digits that a model computes with."""
    computed = {torch.bfloat16, *dtypes} if amp else set(dtypes)
    return float(max(torch.finfo(dtype).eps for dtype in computed) ** 0.5)


def _beginning(batch: Any, size: int | None) -> Any:
    return mapped(batch, lambda tensor: tensor[:size] if tensor.ndim else tensor)


def _fails(make: Callable[[], Callable[[], object]]) -> bool:
    try:
        _brought_by_first(make())
    except Exception:
        return True
    return False


def shows_alone(
    make: Make,
    batch: Any,
    answers: Mapping[Key, Any],
    shown: Mapping[Key, Tensor],
    tolerance: float,
) -> bool:
    """Whether a forward shows alone what it has shown while others waited beside it.

    One sample will do, unless the samples of a batch change each other, or the model does not
    take one alone. Of a model that draws random numbers it cannot be told, and the answer is yes.

    Args:
        make: makes of a batch its forward.
        batch: the batch.
        answers: the statistics of each meeting.
        shown: what it has shown, by meeting: the first sample of a norm's input.
        tolerance: how far that may differ, relative to its size.

    Raises:
        Exception: whatever the model raises on the whole batch.
    """
    with kept_random_state():
        with suppress(Exception):
            if _agree(tolerance, _alone(make(_beginning(batch, FEW)), answers), shown):
                return True
        once = _alone(make(batch), answers)
        if _agree(tolerance, once, shown):
            return True
        return not _agree(tolerance, _alone(make(batch), answers), once)


def _alone(run: Callable[[], object], answers: Mapping[Key, Any]) -> dict[Key, Tensor]:
    """What a forward shows at each meeting that is settled."""
    strand, calls, found = Strand(run), Counter[int](), dict[Key, Tensor]()
    try:
        arrival = strand.advance()
        while not strand.ended:
            key = (arrival.place, calls[arrival.place])
            calls[arrival.place] += 1
            if key not in answers:
                break
            found[key] = arrival.show()
            arrival = strand.advance(answers[key])
    finally:
        strand.give_up()
    return found


def _agree(tolerance: float, one: Mapping[Key, Tensor], other: Mapping[Key, Tensor]) -> bool:
    return all(key in one and _near(tolerance, one[key], each) for key, each in other.items())


def _near(tolerance: float, one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).norm() <= tolerance * other.norm())


def _brought_by_first(*runs: Callable[[], object]) -> list[tuple[int, Batch]]:
    """Run forwards by turns, each from norm to norm; return what the first brings where."""
    with ExitStack() as strands:
        turns = [strands.enter_context(closing(_brought(run))) for run in runs]
        return [each[0] for each in zip_longest(*turns) if each[0] is not None]


def _brought(run: Callable[[], object]) -> Generator[tuple[int, Batch], None, None]:
    """Run a forward, each norm by the statistics of what comes to it."""
    strand = Strand(run)
    try:
        arrival = strand.advance()
        while not strand.ended:
            batch = arrival.bring(0)
            yield arrival.place, batch
            arrival = strand.advance((batch.mean, batch.var))
    finally:
        strand.give_up()


def _same(tolerance: float, one: tuple[int, Batch], other: tuple[int, Batch]) -> bool:
    (place, batch), (other_place, beside) = one, other
    scale = (batch.mean.square() + batch.var).sum().sqrt()
    apart = (batch.mean - beside.mean).norm() + (batch.var.sqrt() - beside.var.sqrt()).norm()
    return place == other_place and bool(apart <= tolerance * scale)
