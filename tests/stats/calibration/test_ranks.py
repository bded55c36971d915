"""Calibration on several ranks: all end with the same affines, those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.calibration import fit_one_by_one
from tests.reference.data import close
from tests.reference.ranks import on_ranks
from tests.stats.calibration.nets import NORMS, affines, bits, conv_net, images, pair_of

#: The batches of each rank, by their sizes.
SHARDS = {
    "uneven": ([7, 4, 1, 6, 2], [5, 3]),
    "one batch": ([4, 4, 4, 4, 4], [8]),
    "one empty": ([7, 9, 5, 7], []),
    "the first empty": ([], [20, 8]),
}
#: So few different samples that what is held out is like the rest, and refining helps.
DATA = images(4).repeat(7, 1, 1, 1)


def fresh() -> tuple[nn.Module, nn.Module]:
    return pair_of(conv_net(), carry="fresh")


def shard(kind: str, rank: int) -> list[Tensor]:
    sizes = SHARDS[kind]
    start = sum(sizes[0]) * rank
    return list(DATA[start : start + sum(sizes[rank])].split(sizes[rank]) if sizes[rank] else [])


def everything(rank: int) -> dict[str, Any]:
    """What one rank does."""
    result: dict[str, Any] = {}
    for kind in SHARDS:
        for passes in (0, 3):
            model, _ = fresh()
            report = normswap.calibrate(model, shard(kind, rank), refine_passes=passes)
            told = [report.kept, report.output_before, report.output_fitted, report.output_after]
            sites = [[row.before, row.after] for row in report]
            result[f"{kind}, {passes}"] = affines(model), told, sites, report.samples
    result["failures"] = [failure(rank, calls) for calls in (1, 3, 5, 7, 9, 14)]
    result["no data"] = told_of(lambda: normswap.calibrate(fresh()[0], []))
    model, _ = fresh()
    wrapped = nn.parallel.DistributedDataParallel(model)
    normswap.calibrate(wrapped, shard("uneven", rank), refine_passes=0)
    result["wrapped"] = affines(model)
    return result


def failure(rank: int, calls: int) -> tuple[str, bool]:
    """The model fails on the second rank, at its so-manyth call."""
    model, _ = fresh()
    before, left = bits(model), [calls]

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        left[0] -= 1
        if rank == 1 and not left[0]:
            raise ValueError("on purpose")
        return model(x)

    told = told_of(lambda: normswap.calibrate(model, shard("uneven", rank), forward=forward))
    return told, bits(model) == before


def told_of(run: Any) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return on_ranks(2, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("kind", SHARDS)
def test_all_ranks_end_alike(ranks: list[dict[str, Any]], kind: str, passes: int) -> None:
    one, two = (rank[f"{kind}, {passes}"] for rank in ranks)
    for found, other in zip(one[0], two[0], strict=True):
        assert torch.equal(found, other)
    assert one[1:3] == two[1:3]
    assert one[3] + two[3] == 28
    kept, before, fitted, after = one[1]
    assert kept == ("refined" if passes else "fitted")
    assert after <= min(before, fitted)


@pytest.mark.parametrize("kind", SHARDS)
def test_the_fit_is_that_of_one_process(ranks: list[dict[str, Any]], kind: str) -> None:
    model, original = fresh()
    fit_one_by_one(model, original, NORMS, [DATA])
    for found, wanted in zip(ranks[0][f"{kind}, 0"][0], affines(model), strict=True):
        close(found, wanted)


def test_a_wrapped_model_is_seen_through(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for found, wanted in zip(rank["wrapped"], rank["uneven, 0"][0], strict=True):
            assert torch.equal(found, wanted)


def test_one_fails_all_fail_and_none_is_changed(ranks: list[dict[str, Any]]) -> None:
    for (ours, unchanged), (theirs, unchanged_too) in zip(
        ranks[0]["failures"], ranks[1]["failures"], strict=True
    ):
        assert theirs == "ValueError: on purpose"
        assert "rank 1 failed" in ours
        assert unchanged
        assert unchanged_too


def test_without_data_on_any_rank_all_say_so(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "no sample" in rank["no data"] or "failed" in rank["no data"]
