"""Population statistics of models that keep things on themselves while they run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import normswap
from normswap.errors import StatisticsError
from tests.reference.footprint import footprint


class Two(nn.Module):
    """A linear layer and two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.first, self.last = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.kept: Any = None
        self.average = nn.Parameter(torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.linear(x)))  # type: ignore[no-any-return]


class KeepsShape(Two):
    """Later parts go by the size of the batch as an earlier part has seen it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = len(x)
        y = self.first(self.linear(x).flatten(0, 1)).relu()
        return self.last(y.view(self.kept, -1, 6).mean(1))  # type: ignore[no-any-return]


class KeepsValues(Two):
    """Later parts read what an earlier part has kept."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return self.last(self.first(self.linear(x)) * self.kept)  # type: ignore[no-any-return]


class Draws(KeepsValues):
    """The same, and random numbers are drawn that do not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(1)


def population(model: nn.Module, batches: Any, **options: Any) -> normswap.WarmupReport:
    return normswap.warmup(model, batches, method="population", progress=False, **options)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES = {
    "a smaller last batch": (KeepsShape, (data(20, 4, 6) + torch.arange(20)[:, None, None]), 8),
    "batches that are equal": (KeepsValues, torch.cat([data(4, 6)] * 2 + [data(9, 6)]), 4),
    "random numbers": (Draws, data(24, 6), 8),
}


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("case", CASES)
def test_each_runs_alone_where_they_disturb_each_other(case: str, memory: int | None) -> None:
    make, x, size = CASES[case]
    one = make().double()
    many = copy.deepcopy(one)
    population(one, [x])
    report = population(many, x.split(size), memory=memory)
    for name in ("first", "last"):
        ours, theirs = getattr(many, name), getattr(one, name)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-10, atol=0)
    assert report.passes > 1
    assert "each run alone" in report.summary()


def test_others_are_read_once() -> None:
    report = population(Two().double(), data(24, 6).split(8))
    assert report.passes == 1
    assert "alone" not in report.summary()


class Once:
    """A loader whose iterator is always the same one."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


LOADERS = {
    "read once": lambda x: iter(x.split(8)),
    "read once in disguise": lambda x: Once(x.split(8)),
    "shuffled": lambda x: DataLoader(x, batch_size=8, shuffle=True),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_that_yields_other_data_each_time_is_refused(loader: str) -> None:
    model = KeepsValues().double()
    before = footprint(model)
    with pytest.raises(StatisticsError, match=r"disturb each other.*pooled"):
        population(model, LOADERS[loader](data(64, 6)))
    assert footprint(model) == before


class Lends(Two):
    """Sets things for a while."""

    def forward(self, x: Tensor) -> Tensor:
        weight, self.linear.weight.data = self.linear.weight.data, self.average.data
        before, self.kept = self.kept, True
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().forward(x)
        finally:
            torch.set_default_dtype(dtype)
            self.linear.weight.data, self.kept = weight, before


def ways() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.parametrize("method", ["population", "pooled"])
def test_what_is_set_for_a_while_is_put_back(method: Any) -> None:
    model = Lends()
    weight, filters, before = model.linear.weight.detach().clone(), list(warnings.filters), ways()
    normswap.warmup(model, list(data(24, 6).float().split(8)), method=method, progress=False)
    assert torch.equal(model.linear.weight, weight)
    assert model.kept is None
    assert (ways(), warnings.filters) == (before, filters)
    assert torch.get_default_dtype() == torch.float32
