"""What every run of the tests starts with."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Workers beside each other, one on each core, take no further threads.

    And Ctrl-C stops something, also where a shell has started the tests in its background.
    """
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as a terminal, of which each runner of tests reports another size."""
    monkeypatch.setenv("COLUMNS", "160")
