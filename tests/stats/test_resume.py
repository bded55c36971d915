"""A pass that was killed, or failed, goes on from its bookmark with results equal to the bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, StatisticsError
from normswap.stats import bookmark, population
from tests.reference.forks import in_process_of_its_own
from tests.reference.ranks import on_ranks
from tests.stats.killing import PASSES, Trials, trials
from tests.stats.models import cut, images, net

METHODS = ["pooled", "average", "ema", "population"]
SIZES = [4, 3, 5, 2]
each_pass = pytest.mark.parametrize("name", PASSES)
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trials]:
    """What passes came to that were killed and gone on with."""
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    return in_process_of_its_own(trials, tmp_path_factory.mktemp("killed"), 0)


@each_pass
def test_a_bookmark_changes_nothing(killed: dict[str, Trials], name: str) -> None:
    plain, whole = killed[name].plain, killed[name].whole
    assert (plain.buffers, plain.told, plain.work) == (whole.buffers, whole.told, whole.work)


@each_pass
def test_what_was_killed_and_gone_on_with_is_equal_to_the_bit(
    killed: dict[str, Trials], name: str
) -> None:
    assert len(killed[name].killed) == 20
    for trial in killed[name].killed:
        assert trial.outcome.buffers == killed[name].whole.buffers, trial.moment
        assert trial.outcome.told == killed[name].whole.told, trial.moment


@each_pass
def test_what_was_done_is_not_done_again(killed: dict[str, Trials], name: str) -> None:
    bookmarked = [trial for trial in killed[name].killed if trial.bookmarked]
    assert len(bookmarked) >= 5
    for trial in bookmarked:
        assert trial.outcome.work < killed[name].whole.work, trial.moment


@each_pass
def test_nothing_is_left_of_the_bookmark_in_the_end(killed: dict[str, Trials], name: str) -> None:
    for trial in killed[name].killed:
        assert trial.outcome.left == []


def test_the_killed_passes_skip_and_stop_early(killed: dict[str, Trials]) -> None:
    """Else the tests above would not show that these go on as they began."""
    assert killed["population"].whole.told["skipped"] == 1
    assert (
        killed["pooled to a tolerance"].whole.told["batches"]
        < (killed["pooled"].whole.told["batches"])
    )


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chance to save is taken."""
    monkeypatch.setattr(bookmark, "SHARE", float("inf"))


def data() -> list[Tensor]:
    return cut(images(sum(SIZES)), SIZES)


def failing(error: type[BaseException]) -> Iterator[Tensor]:
    """Three batches, and an error."""
    yield from data()[:3]
    raise error("on purpose")


class Counting(nn.Module):
    """Counts its calls, and raises at one of them."""

    def __init__(self, raise_at: int | None = None) -> None:
        super().__init__()
        self.calls, self.raise_at = 0, raise_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.raise_at:
            raise LookupError("on purpose")
        return x


def counting(raise_at: int | None = None) -> nn.Sequential:
    return net().insert(2, Counting(raise_at))


def expected(method: str) -> dict[str, Tensor]:
    model = counting()
    normswap.warmup(model, data(), method=method)
    return dict(model.named_buffers())


def assert_goes_on(path: Path, method: str, *, read: int) -> None:
    """Assert that a second pass does the rest only, to the same result."""
    assert path.exists()
    model = counting()
    normswap.warmup(model, data(), method=method, resume=path)
    for name, tensor in expected(method).items():
        assert torch.equal(model.get_buffer(name), tensor), name
    assert model[2].calls == len(SIZES) - read
    assert not path.exists()


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS[:3])
def test_a_loader_that_fails_leaves_a_bookmark(
    tmp_path: Path, method: str, error: type[BaseException]
) -> None:
    path = tmp_path / "pass"
    with pytest.raises(error):
        normswap.warmup(counting(), failing(error), method=method, resume=path)
    assert_goes_on(path, method, read=3)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("method", METHODS[:3])
def test_a_model_that_fails_leaves_a_bookmark(tmp_path: Path, method: str) -> None:
    path = tmp_path / "pass"
    with pytest.raises(LookupError):
        normswap.warmup(counting(raise_at=3), data(), method=method, resume=path)
    assert_goes_on(path, method, read=2)


@pytest.mark.usefixtures("dense")
def test_population_that_is_interrupted_keeps_the_norms_that_are_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted, moments = tmp_path / "pass", expected("population"), population.channel_moments
    measured = []

    def interrupted(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        measured.append(x)
        if len(measured) == len(SIZES) + 1:  # the first batch at the second norm
            raise KeyboardInterrupt
        return moments(x, channel_dim)

    monkeypatch.setattr(population, "channel_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        normswap.warmup(counting(), data(), method="population", resume=path)
    assert path.exists()
    model = counting()
    normswap.warmup(model, data(), method="population", resume=path)
    assert len(measured) == 2 * len(SIZES) + 1
    for name, tensor in wanted.items():
        assert torch.equal(model.get_buffer(name), tensor), name


def saved(folder: Path, method: str = "pooled") -> Path:
    """A bookmark after three batches."""
    path = folder / "pass"
    before, bookmark.SHARE = bookmark.SHARE, float("inf")
    try:
        with pytest.raises(LookupError):
            normswap.warmup(net(), failing(LookupError), method=method, resume=path)
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
    with pytest.raises(StatisticsError, match="not a bookmark.*delete the file"):
        normswap.warmup(net(), data(), resume=path)
    assert path.exists()


def test_a_folder_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no folder"):
        normswap.warmup(net(), failing(LookupError), resume=tmp_path / "no" / "pass")


@each_method
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
    ranks = on_ranks(2, Folder(tmp_path / "files"), tmp_path / "meeting")
    for rank in ranks:
        assert rank["names"] == ["pass.0", "pass.1"]
        assert rank["calls"] == 0
        for name, tensor in expected("pooled").items():
            torch.testing.assert_close(rank["buffers"][name], tensor, rtol=0, atol=1e-10)
    assert not list((tmp_path / "files").iterdir())


class Folder:
    """What a rank does, with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, Any]:
        return on_two_ranks(rank, self.folder)
