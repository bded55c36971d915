"""A pass that is stopped on its way leaves nothing changed and nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import StatisticsError
from normswap.stats import population
from normswap.stats.probe import Probe
from normswap.stats.shelf import Shelf
from normswap.stats.strand import Strand, stop
from tests.reference.footprint import footprint, random_states
from tests.reference.leftovers import files_made, greenlets_made, thread_modes
from tests.stats.failing import SIZES, STOPS, At, Loader, Stash, data, error, mixed

SINGLE = {"memory": 0, "amp": torch.bfloat16, "forward": lambda model, x: model(x.float())}
METHODS: dict[str, dict[str, Any]] = {
    "pooled": {"method": "pooled"},
    "average": {"method": "average"},
    "ema": {"method": "ema"},
    "population": {"method": "population"},
    "in a file": {"method": "population", "memory": 0},
    "each alone": {"method": "population"},
    "mixed precision": {"method": "population", **SINGLE},
}
#: Before which layer of `mixed` something happens: ahead of the first norm, and of the last.
PLACES = {"early": 1, "late": 5}
FIRST, MIDDLE, LAST = 0, 1, len(SIZES) - 1

each_method = pytest.mark.parametrize("name", METHODS)
each_stop = pytest.mark.parametrize("stop", STOPS)
each_place = pytest.mark.parametrize("place", PLACES)
each_batch = pytest.mark.parametrize("index", [FIRST, MIDDLE, LAST])


def model_for(name: str) -> nn.Sequential:
    """Forwards of it disturb each other where each is to run alone."""
    model = mixed()
    if name == "each alone":
        stash = Stash()
        model[0] = nn.Sequential(model[0], stash.keep())
        model[4] = nn.Sequential(model[4], stash.recall())
    if name == "mixed precision":
        model.float()
    return model


@contextmanager
def leaving_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shelf]]:
    """Assert that after the block all is as before it; yield the shelves that were made."""
    shelves: list[Shelf] = []

    class Noted(Shelf):
        def __init__(self, budget: int, *models: nn.Module) -> None:
            super().__init__(budget, *models)
            shelves.append(self)

    monkeypatch.setattr(population, "Shelf", Noted)
    before = footprint(model), random_states(), thread_modes()
    with files_made() as files, greenlets_made() as stopped:
        yield shelves
        assert not stopped()
    assert (footprint(model), random_states(), thread_modes()) == before
    assert all(file.closed for file in files)
    for shelf in shelves:
        assert (shelf.resting, shelf._away) == (0, {})
        assert bool(shelf.spilled) <= bool(files)


def test_what_is_left_would_be_seen() -> None:
    """Else the tests below would show nothing."""
    with greenlets_made() as stopped:
        strand = Strand(lambda: stop("here"))
        strand.advance()
        assert len(stopped()) == 1
        strand.give_up()
        assert not stopped()


def test_one_of_the_models_takes_forwards_that_run_alone() -> None:
    loader = iter(data())
    with pytest.raises(StatisticsError, match="disturb each other"):
        normswap.warmup(model_for("each alone"), loader, method="population")


@each_method
@each_stop
@pytest.mark.parametrize("after", [0, 1, 2, len(SIZES)])
def test_a_loader_that_stops(
    monkeypatch: pytest.MonkeyPatch, name: str, stop: Callable[[], None], after: int
) -> None:
    model = model_for(name)
    with leaving_nothing(model, monkeypatch), pytest.raises(STOPS[stop]):
        normswap.warmup(model, Loader(after, stop), **METHODS[name])


@each_method
@each_stop
@each_place
@each_batch
def test_a_model_that_stops(
    monkeypatch: pytest.MonkeyPatch, name: str, stop: Callable[[], None], place: str, index: int
) -> None:
    model = model_for(name).insert(PLACES[place], At(index, stop))
    with leaving_nothing(model, monkeypatch), pytest.raises(STOPS[stop]):
        normswap.warmup(model, data(), **METHODS[name])


def test_a_model_that_fails_on_some_batch_is_not_said_to_be_disturbed() -> None:
    """A trial of two batches side by side fails, too, but the second does so alone."""
    model = mixed().insert(PLACES["late"], At(MIDDLE, error))
    with pytest.raises(LookupError):
        normswap.warmup(model, iter(data()), method="population")


@each_method
@each_stop
def test_a_model_that_stops_when_all_is_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, stop: Callable[[], None]
) -> None:
    model = model_for(name).append(At(FIRST, stop))
    with leaving_nothing(model, monkeypatch), pytest.raises(STOPS[stop]):
        normswap.warmup(model, data(), **METHODS[name])


@each_method
@each_place
@each_batch
def test_a_batch_that_is_not_finite_there(
    monkeypatch: pytest.MonkeyPatch, name: str, place: str, index: int
) -> None:
    model = model_for(name).insert(PLACES[place], At(index, spoilt))
    told = rf"{'2' if place == 'early' else '6'} \(BatchNorm2d\).*batch {index} "
    with leaving_nothing(model, monkeypatch), pytest.raises(StatisticsError, match=told):
        normswap.warmup(model, data(), **METHODS[name])


def spoilt(x: Tensor) -> Tensor:
    return x * float("nan")


@each_method
@each_batch
def test_a_batch_that_is_skipped_might_not_have_been_there(name: str, index: int) -> None:
    batches = data()
    model, expected = model_for(name), model_for(name)
    normswap.warmup(expected, batches[:index] + batches[index + 1 :], **METHODS[name])
    batches[index] = spoilt(batches[index])
    report = normswap.warmup(model, batches, on_nonfinite="skip", **METHODS[name])
    assert (report.batches, report.skipped) == (len(SIZES) - 1, 1)
    assert report.samples == sum(SIZES) - SIZES[index]
    wanted = dict(expected.named_buffers())
    for path, buffer in model.named_buffers():
        assert torch.equal(buffer, wanted[path]), path


def test_what_was_put_aside_is_back_for_whoever_still_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Tensor] = []
    model = mixed().insert(PLACES["late"], At(LAST, error))
    expected = [model[0](batch) for batch in data()]
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with leaving_nothing(model, monkeypatch) as shelves, pytest.raises(LookupError):
        normswap.warmup(model, data(), method="population", memory=0)
    assert shelves[0].spilled > sum(output.nbytes for output in expected)
    for output in expected:
        assert any(torch.equal(output, each) for each in kept)


@each_method
@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("norm", [1, 2])
def test_an_interrupt_while_norms_are_made_ready(
    monkeypatch: pytest.MonkeyPatch, name: str, hook: str, norm: int
) -> None:
    model, register, calls = model_for(name), getattr(nn.Module, hook), []

    def interrupted(self: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) == norm:
            raise KeyboardInterrupt
        return register(self, *args, **options)

    monkeypatch.setattr(nn.Module, hook, interrupted)
    with leaving_nothing(model, monkeypatch), pytest.raises(KeyboardInterrupt):
        normswap.warmup(model, data(), **METHODS[name])


@each_method
def test_an_interrupt_while_norms_are_left_leaves_none_but_that_one(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever is interrupted, the others are detached."""
    model, detach, left = model_for(name), Probe.detach, []

    def interrupted(self: Probe) -> None:
        left.append(self.site.path)
        detach(self)
        if len(left) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Probe, "detach", interrupted)
    with leaving_nothing(model, monkeypatch), pytest.raises(KeyboardInterrupt):
        normswap.warmup(model, data(), **METHODS[name])
    assert sorted(set(left)) == ["1", "5"]
