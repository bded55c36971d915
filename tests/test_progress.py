"""The bar that a terminal shows."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.progress import rate

pty = pytest.importorskip("pty")

TITLE = "Warm-up"


class Slow:
    """Ten batches of eight samples, slow enough for a rate; then an error, if there is one."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(10):
            time.sleep(0.03)
            yield torch.full((8, 2), float(index)) + torch.arange(8.0)[:, None]
        if self.error is not None:
            raise self.error


def shown(monkeypatch: pytest.MonkeyPatch, loader: Any, **arguments: Any) -> str:
    """What a terminal is sent during a warm-up, whatever becomes of it."""
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with contextlib.suppress(LookupError, KeyboardInterrupt):
            normswap.warmup(nn.BatchNorm1d(2), loader, **arguments)
        terminal.flush()
        os.set_blocking(master, False)
        sent = b""
        try:
            while part := os.read(master, 1 << 16):
                sent += part
        except BlockingIOError:
            pass
    os.close(master)
    return sent.decode()


def test_it_shows_samples_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = shown(monkeypatch, Slow())
    assert TITLE in sent
    assert re.search(r"\d+ samples, [\d,.]+ samples/s, time left .*\d:\d\d:\d\d", sent)


def test_without_a_length_the_time_left_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = shown(monkeypatch, iter(Slow()))
    assert re.search(r"\d+ samples, [\d,.]+ samples/s", sent)
    assert not re.search(r"time left .*\d:\d\d:\d\d", sent)


def test_a_budget_of_samples_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"time left .*\d:\d\d:\d\d", shown(monkeypatch, iter(Slow()), samples=70))


@pytest.mark.parametrize("method", ["pooled", "population"])
@pytest.mark.parametrize("error", [None, LookupError, KeyboardInterrupt])
def test_the_terminal_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None, method: str
) -> None:
    sent = shown(monkeypatch, Slow(error), method=method)
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 1  # the cursor, hidden and shown
    assert sent.rstrip().endswith("\x1b[2K")  # the line is erased


def test_none_is_shown_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Slow(), progress=False) == ""


def test_none_is_shown_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    normswap.warmup(nn.BatchNorm1d(2), Slow())
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("speed", "text"),
    [(12345.6, "12,346 samples/s"), (10, "10 samples/s"), (0.4567, "0.46 samples/s")],
)
def test_rates_are_told_plainly(speed: float, text: str) -> None:
    assert rate(speed, "samples") == text
