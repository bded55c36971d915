"""Population statistics of data that ranks hold in parts: those of one batch of all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.data import close
from tests.reference.ranks import on_ranks
from tests.stats.failing import Stash
from tests.stats.models import cut, images, net, really_trained

#: The batches of each of three ranks, by their sizes.
SHARDS = {
    "uneven": ([3, 4, 1], [5], [2, 2]),
    "an empty one": ([2, 6], [], [4]),
    "an empty one first": ([], [2, 6, 1], [4]),
    "one batch": ([], [], [9]),
    "an empty batch": ([3, 0], [0], [5, 2]),
}
WORLD = 3


def synchronized() -> nn.Module:
    """A net of torch's own norms for ranks."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(net())


def disturbed() -> nn.Module:
    """A net whose forwards have to run alone; a rank of few batches cannot find it out."""
    stash = Stash()
    return net().insert(4, stash.recall()).insert(1, stash.keep())


def passing() -> nn.Module:
    """A net of which one norm does not wait, since it sees sample by sample."""
    return net().insert(3, nn.InstanceNorm2d(3, track_running_stats=True).double())


def mixing() -> nn.Module:
    """A net of norms that do not divide by the plain variance."""
    return normswap.convert(net(), "sn", kappa=1.0)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "net": (net, {}),
    "in a file": (net, {"memory": 0}),
    "synchronized": (synchronized, {}),
    "disturbed": (disturbed, {}),
    "passing": (passing, {"memory": 0}),
    "mixing": (mixing, {}),
    "skipping": (net, {"on_nonfinite": "skip"}),
}
each_shards = pytest.mark.parametrize("kind", SHARDS)
each_case = pytest.mark.parametrize("name", CASES)


def batches_of(kind: str) -> list[list[Tensor]]:
    """The batches of each rank."""
    shards = SHARDS[kind]
    batches = iter(cut(images(sum(map(sum, shards))), [size for shard in shards for size in shard]))
    return [[next(batches) for _ in shard] for shard in shards]


def spoilt() -> Tensor:
    return images(3) * float("nan")


def everything(rank: int) -> dict[str, Any]:
    """What one rank does."""
    result = {}
    for kind in SHARDS:
        for name, (make, options) in CASES.items():
            mine = batches_of(kind)[rank]
            if name == "skipping" and rank == 1:
                mine.insert(len(mine) // 2, spoilt())
            model = make()
            report = normswap.warmup(model, mine, method="population", **options)
            result[f"{name}, {kind}"] = (dict(model.named_buffers()), report.skipped)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got."""
    return on_ranks(WORLD, everything, tmp_path_factory.mktemp("ranks"))


@each_shards
@each_case
def test_ranks_are_one_process(ranks: list[dict[str, Any]], name: str, kind: str) -> None:
    make, options = CASES[name]
    expected = make()
    batches = [batch for shard in batches_of(kind) for batch in shard]
    normswap.warmup(expected, batches, method="population", **options)
    for rank in ranks:
        found, _ = rank[f"{name}, {kind}"]
        assert found.keys() == dict(expected.named_buffers()).keys()
        for path, buffer in expected.named_buffers():
            close(found[path], buffer)


@each_shards
@each_case
def test_ranks_agree_to_the_bit(ranks: list[dict[str, Any]], name: str, kind: str) -> None:
    first, *others = (rank[f"{name}, {kind}"][0] for rank in ranks)
    for other in others:
        assert all(torch.equal(first[path], other[path]) for path in first)


@each_shards
def test_one_process_is_one_batch_in_train_mode(kind: str) -> None:
    """What the ranks are compared with is right: plain torch says the same."""
    model = net()
    batches = [batch for shard in batches_of(kind) for batch in shard]
    for norm in (model[1], model[5]):
        norm.momentum = 1.0
    wanted = really_trained(model, [torch.cat(batches)])
    normswap.warmup(model, batches, method="population")
    for index in (1, 5):
        close(model[index].running_mean, wanted[index].running_mean)
        close(model[index].running_var, wanted[index].running_var)


@each_shards
def test_only_the_rank_that_skipped_says_so(ranks: list[dict[str, Any]], kind: str) -> None:
    assert [rank[f"skipping, {kind}"][1] for rank in ranks] == [0, 1, 0]
