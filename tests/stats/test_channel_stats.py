"""Statistics of a data set as a value: merged, kept, printed, and handed on."""

from __future__ import annotations

import itertools
import json
import pickle
import sys

import pytest
import torch

from normswap import DatasetStats, dataset_stats
from normswap.errors import MissingExtra, OptionError, StatisticsError
from tests.reference.data import values
from tests.stats.models import cut
from tests.stats.test_dataset import assert_describes

DATA = values(30, 3, 4, 2)
SHARDS = [dataset_stats([shard]) for shard in cut(DATA, [1, 7, 20, 2])]
STATS = dataset_stats([DATA])


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_sums_are_of_all_data(order: tuple[int, ...]) -> None:
    merged = sum(SHARDS[index] for index in order)
    assert isinstance(merged, DatasetStats)
    assert_describes(merged, DATA)
    assert merged.samples == 30


def test_trees_of_merges_are_of_all_data() -> None:
    a, b, c, d = SHARDS
    assert_describes(a.merge(b).merge(c.merge(d)), DATA)
    assert_describes(a + (b + (c + d)), DATA)


def test_merging_leaves_the_parts_alone() -> None:
    before = [shard.to_dict() for shard in SHARDS]
    SHARDS[0].merge(SHARDS[1])
    assert [shard.to_dict() for shard in SHARDS] == before


def test_skipped_batches_add_up() -> None:
    bad = torch.full((1, 3, 4, 2), torch.nan)
    one = dataset_stats([DATA, bad], on_nonfinite="skip")
    two = dataset_stats([bad, bad, DATA], on_nonfinite="skip")
    assert (one + two).skipped == 3


def test_other_channels_do_not_merge() -> None:
    with pytest.raises(StatisticsError, match="3 channels and of 2"):
        STATS.merge(dataset_stats([values(4, 2)]))


@pytest.mark.parametrize("other", [1, None, "statistics"])
def test_only_statistics_are_added(other: object) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        STATS + other
    with pytest.raises(TypeError, match=r"unsupported operand|can only concatenate"):
        other + STATS  # type: ignore[operator]


def test_json_keeps_every_bit() -> None:
    kept = DatasetStats.from_dict(json.loads(json.dumps(STATS.to_dict())))
    assert torch.equal(kept.mean, STATS.mean)
    assert torch.equal(kept.var, STATS.var)
    assert kept == STATS
    assert hash(kept) == hash(STATS)
    assert kept != SHARDS[0]


def test_it_pickles() -> None:
    assert pickle.loads(pickle.dumps(STATS)) == STATS


@pytest.mark.parametrize("change", [{"eps": 1}, {"means": None}])
def test_other_dictionaries_are_refused(change: dict[str, object]) -> None:
    numbers = {**STATS.to_dict(), **change}
    numbers = {key: value for key, value in numbers.items() if value is not None}
    with pytest.raises(OptionError, match=r"\['count', .*to_dict"):
        DatasetStats.from_dict(numbers)


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        STATS.count = 3  # type: ignore[misc]
    STATS.mean.zero_()
    assert_describes(STATS, DATA)


def test_it_prints_as_a_table() -> None:
    stats = dataset_stats([torch.tensor([[0.0, 5.0], [2.0, 5.0]])])
    lines = [line.split() for line in str(stats).splitlines()]
    assert ["channel", "mean", "std"] in lines
    assert ["0", "1", "1.41421"] in lines
    assert ["1", "5", "0"] in lines
    assert "2 channels of 2 values each, from 2 samples" in str(stats)
    assert repr(stats) == "<DatasetStats: 2 channels of 2 values each, from 2 samples>"


def test_torchvision_takes_it() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    normalize = STATS.as_transform()
    assert isinstance(normalize, transforms.Normalize)
    again = dataset_stats([torch.stack([normalize(image) for image in DATA])])
    torch.testing.assert_close(again.mean, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(again.var, torch.ones(3, dtype=torch.float64))


def test_torchvision_normalizes_bytes_so() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    images = torch.arange(2 * 3 * 5 * 6).view(2, 5, 6, 3).to(torch.uint8)
    whole = transforms.Compose(
        [
            transforms.ToTensor(),
            dataset_stats([images], channel_dim=-1).as_transform(),
        ]
    )
    again = dataset_stats([torch.stack([whole(image.numpy()) for image in images])])
    torch.testing.assert_close(again.mean.float(), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.var.float(), torch.ones(3), rtol=0, atol=1e-6)


def test_timm_takes_it() -> None:
    data = pytest.importorskip("timm.data")
    from torchvision.transforms import Normalize

    transform = data.create_transform(32, **STATS.as_timm())
    (normalize,) = (step for step in transform.transforms if isinstance(step, Normalize))
    torch.testing.assert_close(normalize.mean, STATS.mean.float())
    torch.testing.assert_close(normalize.std, STATS.std.float())
    config = data.resolve_data_config({"input_size": (3, 32, 32), **STATS.as_timm()})
    assert config["mean"] == tuple(STATS.mean.tolist())
    assert config["std"] == tuple(STATS.std.tolist())


def test_constant_channels_do_not_divide() -> None:
    stats = dataset_stats([torch.tensor([[0.1, 5.0], [0.2, 5.0]])])
    for use in (stats.as_timm, stats.as_transform):
        with pytest.raises(StatisticsError, match="channel 1 is constant"):
            use()


def test_without_torchvision_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(MissingExtra, match=r"torchvision.*pip install torchvision"):
        STATS.as_transform()
