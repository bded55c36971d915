"""Ranks that fail together go on together, also when one of them has lost its bookmark."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import normswap
from normswap.errors import StatisticsError
from normswap.stats import bookmark
from tests.reference.data import close
from tests.reference.ranks import on_ranks
from tests.stats.failing import SIZES, At, data, error, mixed

BATCHWISE = ["pooled", "average", "ema"]
METHODS = [*BATCHWISE, "population"]
#: The batches of each rank.
SHARDS = [slice(0, 2), slice(2, 4)]
CASES = [(method, lost) for method in METHODS for lost in (None, 0, 1)]


def everything(folder: Path, rank: int) -> dict[str, Any]:
    """What one rank does: it fails, maybe loses its bookmark, and goes on."""
    bookmark.SHARE = float("inf")
    return {
        f"{method}, {lost}": failed_and_gone_on(folder / f"{method} {lost}", method, lost, rank)
        for method, lost in CASES
    }


def failed_and_gone_on(folder: Path, method: str, lost: int | None, rank: int) -> dict[str, Any]:
    mine = data()[SHARDS[rank]]
    act = error if rank == 1 else Tensor.clone
    model = mixed().insert(5, At(len(SIZES) - 1, act))
    with pytest.raises((LookupError, StatisticsError)):
        normswap.warmup(model, mine, method=method, resume=folder / "pass")
    dist.barrier()
    names = sorted(os.listdir(folder))
    dist.barrier()
    if rank == lost:
        (folder / f"pass.{rank}").unlink(missing_ok=True)
    model, calls = mixed().insert(5, At(len(SIZES) - 1, Tensor.clone)), [0]
    model[0].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    normswap.warmup(model, mine, method=method, resume=folder / "pass")
    dist.barrier()
    return {
        "names": names,
        "left": os.listdir(folder),
        "calls": calls[0],
        "buffers": dict(model.named_buffers()),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks met with."""
    folder = tmp_path_factory.mktemp("files")
    for method, lost in CASES:
        (folder / f"{method} {lost}").mkdir()
    meeting = tmp_path_factory.mktemp("meeting")
    return on_ranks(2, partial(everything, folder), meeting)


@pytest.mark.parametrize(("method", "lost"), CASES)
def test_the_result_is_that_of_one_process(
    ranks: list[dict[str, Any]], method: str, lost: int | None
) -> None:
    results = [rank[f"{method}, {lost}"] for rank in ranks]
    for path, buffer in results[0]["buffers"].items():
        assert torch.equal(buffer, results[1]["buffers"][path]), path
    if method != "ema":  # which of several ranks is another average than of one
        expected = mixed()
        normswap.warmup(expected, data(), method=method)
        for index, found in ((1, "1"), (5, "6")):
            close(results[0]["buffers"][f"{found}.running_mean"], expected[index].running_mean)
            close(results[0]["buffers"][f"{found}.running_var"], expected[index].running_var)


@pytest.mark.parametrize("method", BATCHWISE)
def test_what_was_read_is_not_read_again_but_by_who_lost_it(
    ranks: list[dict[str, Any]], method: str
) -> None:
    calls = {lost: [rank[f"{method}, {lost}"]["calls"] for rank in ranks] for lost in (None, 0, 1)}
    assert calls == {None: [0, 1], 0: [2, 1], 1: [0, 2]}


@pytest.mark.parametrize(("method", "lost"), CASES)
def test_each_rank_has_a_file_which_is_gone_in_the_end(
    ranks: list[dict[str, Any]], method: str, lost: int | None
) -> None:
    for rank in ranks:
        result = rank[f"{method}, {lost}"]
        assert (result["names"], result["left"]) == (["pass.0", "pass.1"], [])
