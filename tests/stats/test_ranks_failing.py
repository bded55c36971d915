"""One rank fails: every rank raises, none waits for ever, and nothing is written on any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor, nn

import normswap
from tests.reference.data import close
from tests.reference.footprint import footprint, random_states
from tests.reference.ranks import on_ranks
from tests.stats.failing import SIZES, At, Loader, Stash, data, error, mixed

METHODS: dict[str, dict[str, Any]] = {
    "pooled": {"method": "pooled"},
    "average": {"method": "average"},
    "ema": {"method": "ema"},
    "population": {"method": "population"},
    "in a file": {"method": "population", "memory": 0},
}
#: Of each rank's loader the first and the last batch; the third rank has none.
SHARDS = [slice(0, 3), slice(3, 4), slice(0, 0)]
WORLD = len(SHARDS)

#: Makes, of the batches of the rank that fails, the loader and model that it fails with.
Failure = Callable[[list[Tensor]], tuple[Iterable[Tensor], nn.Module]]


def loader_at_once(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return Loader(0, error), mixed()


def loader_at_its_end(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return Loader(len(mine), error, mine), mixed()


def model_early(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return mine, mixed().insert(1, At(_last_of(mine), error))


def model_late(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return mine, mixed().insert(5, At(_last_of(mine), error))


def nan_early(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return [*mine[:-1], mine[-1] * float("nan")], mixed()


def nan_late(mine: list[Tensor]) -> tuple[Iterable[Tensor], nn.Module]:
    return mine, mixed().insert(5, At(_last_of(mine), lambda x: x * float("nan")))


def _last_of(mine: list[Tensor]) -> int:
    return SIZES.index(len(mine[-1]))


BY_LOADER: list[Failure] = [loader_at_once, loader_at_its_end]
BY_DATA: list[Failure] = [model_early, model_late, nan_early, nan_late]
#: By name: the method, what fails, and on which rank.
CASES: dict[str, tuple[str, Failure, int]] = {
    f"{method}, {failure.__name__}, {rank}": (method, failure, rank)
    for method in METHODS
    for rank in range(WORLD)
    for failure in (BY_LOADER + BY_DATA if rank < 2 else BY_LOADER)
}


def outcome(model: nn.Module, loader: Iterable[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """What a pass raised, and whether all is as before it."""
    before = footprint(model), random_states()
    raised, message = None, ""
    try:
        normswap.warmup(model, loader, **options)
    except Exception as seen:
        raised, message = type(seen).__name__, str(seen)
    untouched = (footprint(model), random_states()) == before
    return {"raised": raised, "message": message, "untouched": untouched}


def disturbed() -> nn.Sequential:
    """A model whose forwards have to run alone."""
    model, stash = mixed(), Stash()
    return model.insert(5, stash.recall()).insert(1, stash.keep())


def everything(rank: int) -> dict[str, Any]:
    """What one rank does: it fails in every way, and succeeds in the end."""
    mine = data()[SHARDS[rank]]
    result: dict[str, Any] = {}
    for name, (method, failure, failing) in CASES.items():
        loader, model = failure(mine) if rank == failing else (mine, mixed())
        result[name] = outcome(model, loader, METHODS[method])
    once = iter(mine) if rank == 0 else mine
    result["read once"] = outcome(disturbed(), once, METHODS["population"])
    model = mixed()
    normswap.warmup(model, mine)
    result["success"] = dict(model.named_buffers())
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank met with."""
    return on_ranks(WORLD, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_every_rank_raises_and_none_is_changed(ranks: list[dict[str, Any]], name: str) -> None:
    _, failure, failing = CASES[name]
    for rank, result in enumerate(ranks):
        seen = result[name]
        if rank != failing:
            assert seen["raised"] == "_AnotherFailed"
            assert f"rank {failing} failed" in seen["message"]
        elif failure in (nan_early, nan_late):
            assert seen["raised"] in ("StatisticsError", "NotFinite")
            assert f"batch {len(data()[SHARDS[rank]]) - 1} " in seen["message"]
        else:
            assert seen["raised"] == "LookupError"
        assert seen["untouched"]


def test_a_loader_that_one_rank_can_read_only_once(ranks: list[dict[str, Any]]) -> None:
    first, *others = (result["read once"] for result in ranks)
    assert "disturb each other" in first["message"]
    for seen in others:
        assert "rank 0 failed" in seen["message"]
    assert all(result["read once"]["untouched"] for result in ranks)


def test_ranks_that_failed_can_go_on_together(ranks: list[dict[str, Any]]) -> None:
    expected = mixed()
    normswap.warmup(expected, data())
    for result in ranks:
        for path, buffer in expected.named_buffers():
            close(result["success"][path], buffer)
