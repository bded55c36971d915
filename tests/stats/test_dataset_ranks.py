"""Statistics of data that is spread over ranks: all end with those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from normswap import DatasetStats, dataset_stats
from normswap.errors import NormSwapError
from tests.reference.data import values
from tests.reference.ranks import on_ranks
from tests.stats.models import cut
from tests.stats.test_dataset import assert_describes

Results = list[dict[str, Any]]

DATA = values(12, 3, 4, 2)
NAN = torch.full((1, 3, 4, 2), torch.nan)
#: What each rank's loader yields.
SHARDS: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    "uneven": (cut(DATA[:8], [3, 4, 1]), [DATA[8:]]),
    "one empty": ([], cut(DATA, [2, 10])),
    "the other empty": (cut(DATA, [2, 10]), []),
    "single values": ([torch.zeros(1, 3)], [torch.ones(1, 3)]),
    "some skipped": ([NAN, DATA[:5], NAN], [DATA[5:], NAN]),
    "all skipped on one": ([NAN], [DATA]),
}
FAULTS: dict[str, tuple[list[Any], list[Any]]] = {
    "no data": ([], []),
    "other channels": ([DATA], [DATA[:, :2]]),
    "one fails": ([DATA], [DATA, "text"]),
    "one fails, one is empty": (["text"], []),
}


def everything(rank: int) -> dict[str, Any]:
    """What one rank does."""
    result: dict[str, Any] = {}
    for name, shards in SHARDS.items():
        result[name] = dataset_stats(shards[rank], on_nonfinite="skip").to_dict()
    for name, faults in FAULTS.items():
        with pytest.raises(NormSwapError) as caught:
            dataset_stats(faults[rank])
        result[name] = str(caught.value)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two ranks got."""
    return on_ranks(2, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SHARDS)
def test_ranks_agree_to_the_bit(ranks: Results, name: str) -> None:
    assert ranks[0][name] == ranks[1][name]


@pytest.mark.parametrize("name", SHARDS)
def test_ranks_have_the_statistics_of_the_whole(ranks: Results, name: str) -> None:
    stats = DatasetStats.from_dict(ranks[0][name])
    read = [batch for shard in SHARDS[name] for batch in shard]
    sound = [batch for batch in read if batch.isfinite().all()]
    assert_describes(stats, torch.cat(sound))
    assert stats.samples == sum(map(len, sound))
    assert stats.skipped == len(read) - len(sound)


def test_ranks_fail_together(ranks: Results) -> None:
    first, second = ranks
    assert "no data" in first["no data"]
    assert "no data" in second["no data"]
    assert "3 channels on this rank, and 2 on another" in first["other channels"]
    assert "rank 0 failed" in second["other channels"]
    assert "rank 1 failed" in first["one fails"]
    assert "batch 1" in second["one fails"]
    assert "batch 0" in first["one fails, one is empty"]
    assert "rank 0 failed" in second["one fails, one is empty"]
