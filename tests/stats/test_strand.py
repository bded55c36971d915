"""Functions that stop on their way and go on later."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from greenlet import GreenletExit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import StatisticsError
from normswap.stats.strand import Strand, stop
from tests.reference.leftovers import greenlets_made, thread_modes


def test_it_goes_from_stop_to_stop() -> None:
    told = []

    def run() -> str:
        told.append(stop("first"))
        told.append(stop("second"))
        return "result"

    strand = Strand(run)
    assert (strand.advance(), strand.ended) == ("first", False)
    assert strand.advance(1) == "second"
    assert (strand.advance(2), strand.ended) == ("result", True)
    assert told == [1, 2]


def test_it_stops_however_deep_its_calls_are() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + stop(x.sum())

    strand = Strand(lambda: nn.Sequential(Layer(), nn.Sequential(Layer()))(torch.ones(2)))
    assert strand.advance() == 2
    assert strand.advance(1.0) == 4
    assert torch.equal(strand.advance(2.0), torch.tensor([4.0, 4.0]))


def test_many_take_turns_in_any_order() -> None:
    def run(number: int) -> list[Any]:
        return [stop((number, step)) for step in range(3)]

    strands = [Strand(lambda number=number: run(number)) for number in range(20)]
    assert [strand.advance() for strand in strands] == [(number, 0) for number in range(20)]
    for step in range(2):
        for number in reversed(range(20)):
            assert strands[number].advance(10 * number + step) == (number, step + 1)
    for number, strand in enumerate(strands):
        assert strand.advance("end") == [10 * number, 10 * number + 1, "end"]


def test_one_may_run_another() -> None:
    def outer() -> list[Any]:
        inner = Strand(lambda: stop("inner"))
        return [inner.advance(), stop("outer"), inner.advance("from outer")]

    strand = Strand(outer)
    assert strand.advance() == "outer"
    assert strand.advance("from test") == ["inner", "from test", "from outer"]


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_what_it_raises_is_raised_where_it_is_advanced(error: type[BaseException]) -> None:
    def run() -> None:
        stop("here")
        raise error("on purpose")

    strand = Strand(run)
    strand.advance()
    with pytest.raises(error, match="on purpose"):
        strand.advance()
    assert strand.ended


def test_giving_up_runs_what_is_to_run_in_the_end_and_frees_what_was_held() -> None:
    ends = []

    class Held:
        def __del__(self) -> None:
            ends.append("freed")

    def run() -> None:
        held = Held()
        try:
            stop(id(held))
        finally:
            ends.append("finally")

    strand = Strand(run)
    strand.advance()
    strand.give_up()
    gc.collect()
    assert strand.ended
    assert ends == ["finally", "freed"]


def test_what_was_given_up_cannot_stop_again() -> None:
    reached = []

    def stubborn() -> None:
        for _ in range(3):
            try:
                stop("here")
            except GreenletExit:
                reached.append(True)

    with greenlets_made() as stopped:
        strand = Strand(stubborn)
        strand.advance()
        strand.give_up()
        assert (strand.ended, reached) == (True, [True] * 3)
        assert not stopped()


def test_giving_up_what_has_not_begun_or_has_ended_does_nothing() -> None:
    strand = Strand(lambda: pytest.fail("it began"))
    strand.give_up()
    ended = Strand(lambda: None)
    ended.advance()
    ended.give_up()
    assert ended.ended


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_stop_outside_of_any_is_refused() -> None:
    with pytest.raises(StatisticsError, match="outside of the forward"):
        stop("here")


def test_a_stop_in_a_thread_of_it_is_refused() -> None:
    errors = []

    def refused() -> None:
        with pytest.raises(StatisticsError, match="in a thread"):
            stop("here")
        errors.append(True)

    strand = Strand(lambda: in_a_thread(refused))
    strand.advance()
    assert (strand.ended, errors) == (True, [True])


class Doubling(TorchFunctionMode):
    """Doubles what `torch.add` returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.add else result


MODES = {
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": Doubling,
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@each_mode
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad])
def test_modes_that_it_sets_hold_only_inside(
    mode: Callable[[], Any], around: Callable[[], Any]
) -> None:
    def run() -> tuple[list[Any], list[Any]]:
        with mode():
            inside = thread_modes()
            stop("here")
            return inside, thread_modes()

    with around():
        outside = thread_modes()
        first, second = Strand(run), Strand(run)
        first.advance()
        assert thread_modes() == outside
        second.advance()
        for strand in (first, second):
            inside, later = strand.advance()
            assert inside == later
            assert thread_modes() == outside


@each_mode
def test_modes_that_it_sets_are_undone_when_it_is_given_up(mode: Callable[[], Any]) -> None:
    def run() -> None:
        with mode():
            stop("here")

    outside = thread_modes()
    strand = Strand(run)
    strand.advance()
    strand.give_up()
    assert thread_modes() == outside


def test_a_function_mode_sees_what_its_own_strand_does() -> None:
    def run(doubled: bool) -> Tensor:
        one = torch.ones(())
        if not doubled:
            stop("here")
            return torch.add(one, one)
        with Doubling():
            stop("here")
            return torch.add(one, one)

    strands = [Strand(lambda doubled=doubled: run(doubled)) for doubled in (True, False, True)]
    for strand in strands:
        strand.advance()
    assert [float(strand.advance()) for strand in strands] == [4, 2, 4]


def test_context_variables_that_it_sets_are_its_own() -> None:
    variable = ContextVar("variable", default="outside")

    def run(value: str) -> list[str]:
        seen = [variable.get()]
        variable.set(value)
        stop("here")
        return [*seen, variable.get()]

    strands = [Strand(lambda value=value: run(value)) for value in "ab"]
    for strand in strands:
        strand.advance()
        assert variable.get() == "outside"
    assert [strand.advance() for strand in strands] == [["outside", "a"], ["outside", "b"]]
