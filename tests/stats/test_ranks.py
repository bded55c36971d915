"""Warming up on several ranks: all end with the same statistics, those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.data import close
from tests.reference.footprint import footprint
from tests.reference.ranks import on_ranks
from tests.stats.models import cut, images, kept, net, one_norm

Statistics = dict[str, Tensor]
Results = list[dict[str, Any]]

#: The batches of each rank, by their sizes.
SHARDS = {"uneven": ([3, 4, 1], [5]), "one empty": ([], [2, 6])}
METHODS = ["pooled", "average", "ema"]


def torchs_sync() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(net())


def our_sync() -> nn.Module:
    return normswap.convert(net(), "sync_bn")


def sync_option() -> nn.Module:
    return normswap.convert(net(), "bn", sync=True)


MODELS = {"net": net, "torch's": torchs_sync, "ours": our_sync, "option": sync_option}


def all_batches(shards: tuple[list[int], list[int]]) -> list[Tensor]:
    return cut(images(sum(map(sum, shards))), [size for shard in shards for size in shard])


def warmed_up(model: nn.Module, batches: list[Tensor], method: str) -> Statistics:
    normswap.warmup(model, batches, method=method)
    return dict(model.named_buffers())


def everything(rank: int) -> dict[str, Any]:
    """What one rank does."""
    result: dict[str, Any] = {}
    for kind, shards in SHARDS.items():
        start = sum(len(shard) for shard in shards[:rank])
        mine = all_batches(shards)[start : start + len(shards[rank])]
        for name, make in MODELS.items():
            result[f"{name}, {kind}, pooled"] = warmed_up(make(), mine, "pooled")
        for method in METHODS[1:]:
            result[f"net, {kind}, {method}"] = warmed_up(net(), mine, method)
    result["one rank only"] = reached_on_one_rank_only(rank)
    result["changes"] = {name: changes(make()) for name, make in MODELS.items()}
    return result


def changes(model: nn.Module) -> list[str]:
    """Which of all attributes a warm-up changes, adds or takes away."""
    before = footprint(model)
    normswap.warmup(model, [images(4)])
    after = footprint(model)
    return sorted(key for key in before | after if before.get(key) != after.get(key))


def reached_on_one_rank_only(rank: int) -> Statistics:
    """Two norms, of which each rank reaches one."""
    model = nn.ModuleList([one_norm(), one_norm()])
    normswap.warmup(model, [images(6, seed=rank)], forward=lambda model, x: model[rank](x))
    return dict(model.named_buffers())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two ranks got."""
    return on_ranks(2, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_to_the_bit(ranks: Results, method: str, kind: str) -> None:
    first, second = (rank[f"net, {kind}, {method}"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("name", MODELS)
def test_pooled_ranks_are_one_process(ranks: Results, name: str, kind: str) -> None:
    expected = warmed_up(MODELS[name](), all_batches(SHARDS[kind]), "pooled")
    for rank in ranks:
        found = rank[f"{name}, {kind}, pooled"]
        assert found.keys() == expected.keys()
        for buffer, tensor in expected.items():
            close(found[buffer], tensor)


@pytest.mark.parametrize("kind", SHARDS)
def test_averaged_ranks_are_one_process(ranks: Results, kind: str) -> None:
    expected = warmed_up(net(), all_batches(SHARDS[kind]), "average")
    for rank in ranks:
        for buffer, tensor in expected.items():
            close(rank[f"net, {kind}, average"][buffer], tensor)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_but_running_statistics(ranks: Results, name: str) -> None:
    for rank in ranks:
        assert rank["changes"][name] == ["1._buffers", "5._buffers"]


def test_a_norm_that_one_rank_alone_reached_is_known_to_all(
    ranks: Results,
) -> None:
    for index in (0, 1):
        expected = one_norm()
        normswap.warmup(expected, [images(6, seed=index)])
        mean, var = kept(expected[1])
        for rank in ranks:
            close(rank["one rank only"][f"{index}.1.running_mean"], mean)
            close(rank["one rank only"][f"{index}.1.running_var"], var)
