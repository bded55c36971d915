"""The file that tells how far a pass has got: what it refuses, and when it is written and gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, StatisticsError
from normswap.stats import bookmark
from normswap.stats.warmup import Method
from tests.reference.data import close
from tests.reference.ranks import on_ranks
from tests.stats.failing import Loader, counting, data, error
from tests.stats.models import cut, images, net


def saved(folder: Path, method: str = "pooled") -> Path:
    """A bookmark after three batches."""
    path = folder / "pass"
    before, bookmark.SHARE = bookmark.SHARE, float("inf")
    try:
        with pytest.raises(LookupError):
            normswap.warmup(net(), Loader(3, error), method=method, resume=path)
    finally:
        bookmark.SHARE = before
    return path


def other_model() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    return model


def other_statistics() -> nn.Module:
    model = net()
    model[1].running_mean += 1
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], Iterable[Tensor], dict[str, Any], str]] = {
    "another model": (other_model, data(), {}, "its model differs"),
    "other statistics": (other_statistics, data(), {}, "its model differs"),
    "another method": (net, data(), {"method": "average"}, "its method differs"),
    "other norms": (net, data(), {"where": "1"}, "its norms differs"),
    "other data": (net, [-x for x in data()], {}, "the same ones again"),
    "another last batch": (net, [*data()[:2], -data()[2]], {}, "the same ones again"),
    "data in another order": (net, data()[::-1], {}, "the same ones again"),
    "data cut otherwise": (net, cut(images(14), [7, 7]), {}, "the same ones again"),
    "less data": (net, data()[:2], {}, "has read 3 batches"),
    "no data": (net, [], {}, "has read 3 batches"),
}


@pytest.mark.parametrize(("make", "loader", "options", "reason"), OTHERS.values(), ids=OTHERS)
def test_a_bookmark_of_something_else_is_refused(
    tmp_path: Path,
    make: Callable[[], nn.Module],
    loader: Iterable[Tensor],
    options: dict[str, Any],
    reason: str,
) -> None:
    path, model = saved(tmp_path), make()
    before, content = dict(model.state_dict()), path.read_bytes()
    with pytest.raises(StatisticsError, match=f"(?s)resume=.*{path.name}.*{reason}"):
        normswap.warmup(model, loader, resume=path, **options)
    assert path.read_bytes() == content
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)


@pytest.mark.parametrize("content", ["nothing", "noise", "half of one", "another file"])
def test_what_is_no_bookmark_is_refused(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    if content == "another file":
        save_file({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(
            {"nothing": b"", "noise": whole[::-1]}.get(content, whole[: len(whole) // 2])
        )
    with pytest.raises(StatisticsError, match=r"not a bookmark.*delete the file"):
        normswap.warmup(net(), data(), resume=path)
    assert path.exists()


def test_a_folder_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no folder"):
        normswap.warmup(net(), Loader(3, error), resume=tmp_path / "no" / "pass")


@pytest.mark.parametrize("method", get_args(Method))
def test_a_pass_that_succeeds_leaves_no_file(tmp_path: Path, method: str) -> None:
    normswap.warmup(net(), data(), method=method, resume=tmp_path / "pass")
    assert not list(tmp_path.iterdir())


def test_saving_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that takes one second is followed by fifty without."""
    clock, saves = [0.0], []

    def slow(*args: Any, **options: Any) -> None:
        saves.append(clock[0])
        clock[0] += 1
        save_file(*args, **options)

    def passing(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            clock[0] += 10
            yield images(4)

    monkeypatch.setattr("safetensors.torch.save_file", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    normswap.warmup(net(), passing(20), resume=tmp_path / "pass")
    assert saves == [10, 61, 112, 163]


def on_two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """A pass in which the second rank fails, and one that goes on."""
    bookmark.SHARE = float("inf")
    mine = data()[2 * rank : 2 * rank + 2]

    def failing_on_the_second() -> Iterator[Tensor]:
        yield from mine
        if rank == 1:
            raise LookupError("on purpose")

    with pytest.raises((LookupError, StatisticsError)):
        normswap.warmup(counting(), failing_on_the_second(), resume=folder / "pass")
    names = sorted(os.listdir(folder))
    model = counting()
    normswap.warmup(model, mine, resume=folder / "pass")
    return {"names": names, "calls": model[2].calls, "buffers": dict(model.named_buffers())}


def test_ranks_have_a_file_each(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "meeting").mkdir()
    expected = counting()
    normswap.warmup(expected, data())
    ranks = on_ranks(2, Folder(tmp_path / "files"), tmp_path / "meeting")
    for rank in ranks:
        assert rank["names"] == ["pass.0", "pass.1"]
        assert rank["calls"] == 0
        for name, tensor in expected.named_buffers():
            close(rank["buffers"][name], tensor)
    assert not list((tmp_path / "files").iterdir())


class Folder:
    """What a rank does, with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, Any]:
        return on_two_ranks(rank, self.folder)
