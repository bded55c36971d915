"""Mean and std of what a loader yields: exact, however the data is cut and stored."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap import DatasetStats, dataset_stats
from normswap.errors import OptionError, StatisticsError
from normswap.stats import dataset
from tests.reference import formulas
from tests.reference.data import close, values
from tests.stats.models import cut

SAMPLES = 96
CUTS = {
    "ones": [1] * SAMPLES,
    "sevens": [7] * 13 + [5],
    "sixty-fours": [64, 32],
    "ragged": [1, 40, 2, 0, 30, 23],
    "one": [SAMPLES],
}
SHAPES = {
    "(N, C)": ((SAMPLES, 3), 1),
    "(N, T, C)": ((SAMPLES, 6, 5), 2),
    "(N, C, H, W)": ((SAMPLES, 3, 6, 5), 1),
    "(N, C, D, H, W)": ((SAMPLES, 3, 2, 6, 5), 1),
}


def assert_describes(stats: DatasetStats, data: Tensor) -> None:
    """Assert that these are the statistics of all values of the data (N, C, ...), to 1e-10."""
    mean, var = formulas.mean_and_unbiased_var(data.double())
    close(stats.mean, mean)
    close(stats.var, var)
    close(stats.std, var.sqrt())
    assert stats.count == data.numel() // data.shape[1]


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES.keys())
def test_the_cut_does_not_matter(shape: tuple[int, ...], dim: int, sizes: list[int]) -> None:
    data = values(*shape)
    stats = dataset_stats(cut(data, sizes))
    assert_describes(stats, data.movedim(dim, 1))
    assert stats.samples == SAMPLES


@pytest.mark.parametrize("at_once", [1, 7, 100])
@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES.keys())
def test_what_is_measured_at_once_does_not_matter(
    shape: tuple[int, ...], dim: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "AT_ONCE", at_once)
    data = values(*shape)
    assert_describes(dataset_stats([data]), data.movedim(dim, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_double(dtype: torch.dtype) -> None:
    data = values(SAMPLES, 3, 6, 5).to(dtype)
    assert_describes(dataset_stats(cut(data, CUTS["sevens"])), data)


def test_data_far_from_zero_keeps_its_variance() -> None:
    data = (1e3 + 1e-2 * values(SAMPLES, 2, 5, 5)).float()
    stats = dataset_stats(cut(data, CUTS["ragged"]))
    for channel in range(2):
        exact = [Fraction(value) for value in data[:, channel].flatten().tolist()]
        assert stats.mean[channel] == pytest.approx(float(statistics.mean(exact)), rel=1e-14)
        assert stats.var[channel] == pytest.approx(float(statistics.variance(exact)), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_a_constant_channel_has_no_variance_at_all(offset: float) -> None:
    constant = torch.full((SAMPLES, 1, 6, 5), 0.1, dtype=torch.float64) + offset
    data = torch.cat([values(SAMPLES, 1, 6, 5), constant], 1)
    stats = dataset_stats(cut(data, CUTS["ragged"]))
    assert stats.mean[1] == data[0, 1, 0, 0]
    assert stats.var[1] == 0
    assert stats.var[0] > 0


def test_bytes_count_from_zero_to_one() -> None:
    data = torch.arange(256).repeat(3)[: 3 * 2 * 5 * 7].view(3, 2, 5, 7)
    stats = dataset_stats([data[:2].to(torch.uint8), data[2:].to(torch.uint8)])
    assert_describes(stats, data.double() / 255)


def test_bytes_and_numbers_may_alternate() -> None:
    bytes_ = torch.arange(120, dtype=torch.uint8).view(10, 2, 3, 2)
    numbers = values(4, 2, 3, 2)
    assert_describes(dataset_stats([bytes_, numbers]), torch.cat([bytes_.double() / 255, numbers]))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
)
def test_other_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(StatisticsError, match=rf"batch 0 .*{dtype}.*select="):
        dataset_stats([torch.ones(4, 3).to(dtype)])


def test_real_images_are_as_numpy_has_them() -> None:
    images = pytest.importorskip("sklearn.datasets").load_digits().images.astype(np.float32)
    labels = torch.arange(len(images))
    set_ = TensorDataset(torch.as_tensor(images)[:, None], labels)
    stats = dataset_stats(DataLoader(set_, batch_size=100, shuffle=True))
    exact = images.astype(np.float64)
    assert stats.mean.item() == pytest.approx(exact.mean(), rel=1e-13)
    assert stats.std.item() == pytest.approx(exact.std(ddof=1), rel=1e-13)
    assert (stats.count, stats.samples) == (images.size, len(images))


class Loader:
    """Counts how many batches were asked of it."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for batch in cut(values(6, 2), [1, 2, 3]):
            self.asked += 1
            # The first entry has another length, and arrays are no tensors.
            yield {"ids": torch.zeros(9, dtype=torch.long), "x": batch.numpy()}


@pytest.mark.parametrize(
    ("budget", "batches"),
    [({"batches": 2}, 2), ({"batches": 9}, 3), ({"samples": 1}, 1), ({"samples": 2}, 2)],
)
def test_a_budget_ends_the_reading(budget: dict[str, int], batches: int) -> None:
    loader = Loader()
    stats = dataset_stats(loader, **budget) if batches > 1 else None
    if stats is None:
        with pytest.raises(StatisticsError, match="1 values per channel"):
            dataset_stats(loader, **budget)
    else:
        assert stats.samples == stats.count == [1, 3, 6][batches - 1]
    assert loader.asked == batches


def test_the_bar_knows_how_much_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    @contextmanager
    def bar(title: str, **options: Any) -> Any:
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr("normswap.stats.feed.bar", bar)
    dataset_stats(Loader())
    dataset_stats(iter(Loader()))
    assert [done for done, _ in told] == [1, 3, 6] * 2
    assert [total for _, total in told] == [3, 4.5, 6, None, None, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5])
def test_values_that_are_not_finite_are_named(bad: float, place: int) -> None:
    data = values(8, 2, 3, 2)
    data[4 + place // 3, 1, place % 3, 0] = bad
    with pytest.raises(StatisticsError, match=r"batch 1 .*not finite in channel 1.*skip"):
        dataset_stats(cut(data, [4, 4]))


def test_such_batches_can_be_left_out() -> None:
    data = values(9, 2, 3, 2)
    data[4, 0, 0] = float("nan")
    stats = dataset_stats(cut(data, [4, 3, 2]), on_nonfinite="skip")
    assert_describes(stats, torch.cat([data[:4], data[7:]]))
    assert (stats.samples, stats.skipped) == (6, 1)
    assert "1 batches skipped" in str(stats)


@pytest.mark.parametrize("loader", [[], [torch.empty(0, 3)], [torch.full((4, 3), torch.nan)]])
def test_no_data_is_refused(loader: list[Tensor]) -> None:
    with pytest.raises(StatisticsError, match=r"no data|0 values per channel"):
        dataset_stats(loader, on_nonfinite="skip")


def test_a_single_value_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"1 values per channel.*two or more"):
        dataset_stats([torch.ones(1, 3)])
    assert dataset_stats([torch.zeros(1, 3), torch.ones(1, 3)]).var.tolist() == [0.5] * 3


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"batch 2 .*: 1 channels, and 3 before it"):
        dataset_stats([torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1)])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(OptionError, match="on_nonfinite='drop'"):
        dataset_stats([], on_nonfinite="drop")  # type: ignore[arg-type]


def test_batches_are_moved_where_they_are_wanted() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        dataset_stats([torch.ones(4, 3)], device="meta")


def test_the_data_stays_as_it_is() -> None:
    data = values(8, 2, 3, 2).requires_grad_()
    before = data.detach().clone()
    stats = dataset_stats([data, {"image": data}])
    assert torch.equal(data, before)
    assert stats.mean.requires_grad is False


def test_the_public_names_are_there() -> None:
    assert {"dataset_stats", "DatasetStats"} <= set(normswap.__all__)
