"""The file that tells how far a pass has got: what it refuses, and when it is written and gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
from tests.stats.failing import Loader, data, error
from tests.stats.models import cut, images, net


def saved(folder: Path, method: str = "pooled", **options: Any) -> Path:
    """A bookmark after three batches."""
    path = folder / "pass"
    before, bookmark.SHARE = bookmark.SHARE, float("inf")
    try:
        with pytest.raises(LookupError):
            normswap.warmup(net(), Loader(3, error), method=method, resume=path, **options)
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


def run(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def run_otherwise(model: nn.Module, batch: Any) -> Any:
    return model(-batch)


OTHERS: dict[str, tuple[Callable[[], nn.Module], Iterable[Tensor], dict[str, Any], str]] = {
    "another model": (other_model, data(), {}, "its model differs"),
    "other statistics": (other_statistics, data(), {}, "its model differs"),
    "another method": (net, data(), {"method": "average"}, "its method differs"),
    "other norms": (net, data(), {"where": "1"}, "its norms differs"),
    "another forward": (net, data(), {"forward": run}, "its forward differs"),
    "another precision": (net, data(), {"amp": torch.bfloat16}, "its amp differs"),
    "other care": (net, data(), {"on_nonfinite": "skip"}, "its on_nonfinite differs"),
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


class Runs:
    """A forward without a name of its own."""

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return model(batch)


FORWARDS = {"a function": run, "a partial": partial(partial(run)), "an object": Runs()}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_the_same_forward_goes_on_and_another_is_refused(tmp_path: Path, forward: Any) -> None:
    path = saved(tmp_path, forward=forward)
    for other in (None, run_otherwise):
        with pytest.raises(StatisticsError, match="its forward differs"):
            normswap.warmup(net(), data(), resume=path, forward=other)
    same = Runs() if isinstance(forward, Runs) else forward
    assert normswap.warmup(net(), data(), resume=path, forward=same).batches == len(data())


def test_autocast_that_is_off_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path, amp=False)
    assert normswap.warmup(net(), data(), resume=path, amp=None).batches == len(data())


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
