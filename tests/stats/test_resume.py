"""A pass that failed goes on from its bookmark with results equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normswap
from normswap.stats import bookmark
from normswap.stats.meetings import Meetings
from tests.stats.failing import SIZES, STOPS, Loader, counting, data

BATCHWISE = ["pooled", "average", "ema"]


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chance to save is taken."""
    monkeypatch.setattr(bookmark, "SHARE", float("inf"))


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
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("method", BATCHWISE)
def test_a_loader_that_fails_leaves_a_bookmark(
    tmp_path: Path, method: str, stop: Callable[[], None]
) -> None:
    path = tmp_path / "pass"
    with pytest.raises(STOPS[stop]):
        normswap.warmup(counting(), Loader(3, stop), method=method, resume=path)
    assert_goes_on(path, method, read=3)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("method", BATCHWISE)
def test_a_model_that_fails_leaves_a_bookmark(tmp_path: Path, method: str) -> None:
    path = tmp_path / "pass"
    with pytest.raises(LookupError):
        normswap.warmup(counting(raise_at=3), data(), method=method, resume=path)
    assert_goes_on(path, method, read=2)


@pytest.mark.usefixtures("dense")
def test_population_that_is_interrupted_keeps_the_norms_that_are_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settle, settled = tmp_path / "pass", Meetings.settle, []

    def interrupted(self: Meetings, key: tuple[int, int], brought: list[Any]) -> Any:
        settled.append(key)
        if len(settled) == 2:
            raise KeyboardInterrupt
        return settle(self, key, brought)

    wanted = expected("population")
    monkeypatch.setattr(Meetings, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        normswap.warmup(counting(), data(), method="population", resume=path)
    assert path.exists()
    model = counting()
    normswap.warmup(model, data(), method="population", resume=path)
    assert settled == [(0, 0), (1, 0), (1, 0)]
    for name, tensor in wanted.items():
        assert torch.equal(model.get_buffer(name), tensor), name
    assert not path.exists()
