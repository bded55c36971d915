"""What a process really needs while forwards wait: no more than it was told, and little besides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.forks import in_process_of_its_own

STATUS = Path("/proc/self/status")
MEGABYTE = 2**20
#: Batches, and bytes of one, which is also what comes to each norm.
BATCHES, SIZE = 80, 2 * MEGABYTE
BUDGETS = {"none": 0, "some": 24 * MEGABYTE, "plenty": 10**12}
#: What a forward that runs needs, and what is freed but not returned to the system yet.
BESIDES = 10 * SIZE + 16 * MEGABYTE

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell")


def told(name: str) -> int:
    """A number of bytes that the system knows of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def batches(count: int) -> Iterator[Tensor]:
    for index in range(count):
        yield torch.full((1, 8, 256, 256), float(index)) + torch.arange(256.0)


def growth_of_all() -> dict[str, int]:
    """By how much the process grows at most in passes of rising budgets."""
    layers = [(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*[module for each in layers for module in each])
    normswap.warmup(model, batches(4), method="population", memory=0)
    growth = {}
    for name, budget in BUDGETS.items():
        before = told("VmRSS")
        normswap.warmup(model, batches(BATCHES), method="population", memory=budget)
        growth[name] = told("VmHWM") - before
    return growth


@pytest.fixture(scope="module")
def growth() -> dict[str, int]:
    """In a process in which nothing else has been."""
    measured: dict[str, int] = in_process_of_its_own(growth_of_all)
    return measured


@pytest.mark.parametrize("name", ["none", "some"])
def test_a_process_grows_by_its_budget_at_most(growth: dict[str, int], name: str) -> None:
    assert growth[name] <= BUDGETS[name] + BESIDES


def test_without_a_budget_it_grows_by_what_waits(growth: dict[str, int]) -> None:
    """Else the test above would measure nothing."""
    assert growth["plenty"] >= BATCHES * SIZE
