"""Running tests on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where other programs run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_another_thread(work: Callable[[], object]) -> None:
    """Run what is given in a new thread on as many of torch's threads as here, until it is done.

    A new thread does not inherit their number, and sums in another order with another one.
    """
    here = torch.get_num_threads()

    def alike() -> None:
        torch.set_num_threads(here)
        work()

    thread = threading.Thread(target=alike)
    thread.start()
    thread.join()
