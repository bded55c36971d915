"""What of a batch is measured: which entry, which dimension, which values."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normswap import dataset_stats
from normswap.errors import OptionError, StatisticsError
from normswap.stats import dataset
from tests.reference.data import values
from tests.stats.models import cut
from tests.stats.test_dataset import assert_describes

Pair = namedtuple("Pair", ["image", "label"])

DATA = values(6, 3, 5, 4)
LABELS = torch.arange(6)
IDS = torch.ones(6, 7, dtype=torch.long)
BATCHES = {
    "a tensor": DATA,
    "a tuple": (DATA, LABELS),
    "a list": [DATA, LABELS],
    "a named tuple": Pair(DATA, LABELS),
    "an array": DATA.numpy(),
    "a tuple of arrays": (DATA.numpy(), LABELS.numpy()),
    "a mapping in a tuple": ({"image": DATA}, LABELS),
    "a mapping": {"label": LABELS, "anything": DATA},
    "another mapping": UserDict({"input_ids": IDS, "pixel_values": DATA}),
    "a mapping of arrays": {"names": np.array(["a"] * 6), "x": DATA.numpy()},
    "masks": {"mask": DATA[:, 0] * 9, "loss_mask": DATA * 8, "x": DATA},
    "a usual name comes first": {"boxes": DATA[:, :, 0] * 9, "image": DATA},
    "the more usual name comes first": {"image": DATA * 9, "pixel_values": DATA},
    "weights have one dimension": {"weight": DATA[:, 0, 0, 0], "x": DATA},
    "the first of several": {"x": DATA, "y": DATA * 9},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_the_data_is_found(batch: Any) -> None:
    assert_describes(dataset_stats([batch]), DATA)


def test_an_entry_can_be_named() -> None:
    assert_describes(dataset_stats([{"image": DATA * 9, "depth": DATA}], key="depth"), DATA)


def test_select_takes_everything_else() -> None:
    stats = dataset_stats([(LABELS, [{"deep": DATA}])], select=lambda batch: batch[1][0]["deep"])
    assert_describes(stats, DATA)


@pytest.mark.parametrize(
    ("batch", "options", "named"),
    [
        ({"image": DATA}, {"key": "imgae"}, r"'imgae'.*Did you mean 'image'"),
        ({"image": DATA}, {"mask": "padding"}, r"no entry 'padding'"),
        ({"ids": IDS, "image_mask": DATA}, {}, r"none of .*'ids', 'image_mask'.*key="),
        (DATA, {"key": "image"}, r"key='image'.*Tensor.*select="),
        ((DATA, LABELS), {"mask": "real"}, r"mask='real'.*Tensor.*select="),
    ],
)
def test_options_that_do_not_fit_are_refused(
    batch: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError, match=f"batch 0 .*{named}"):
        dataset_stats([batch], **options)


@pytest.mark.parametrize("options", [{"key": "image"}, {"mask": "real"}])
def test_select_leaves_nothing_to_name(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="select="):
        dataset_stats([DATA], select=lambda batch: batch, **options)


@pytest.mark.parametrize(
    "batch",
    ["text", 3.0, [], ([DATA[0], DATA[1]], LABELS), np.array(["a", "b"])],
    ids=["text", "a number", "empty", "a list of images", "strings"],
)
def test_what_is_no_tensor_is_refused(batch: Any) -> None:
    with pytest.raises(StatisticsError, match=r"batch 0 .*is no tensor.*select="):
        dataset_stats([batch])


def test_an_entry_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"batch 1 .*a list is no tensor.*select="):
        dataset_stats([{"image": DATA}, {"image": [DATA]}], key="image")


def test_the_batch_is_named() -> None:
    with pytest.raises(StatisticsError, match="batch 2"):
        dataset_stats([DATA, DATA, "text"])


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
def test_a_dimension_that_is_said_wins(dim: int) -> None:
    data = values(5, 3, 6, 4)
    stats = dataset_stats([data, data * 2], channel_dim=dim)
    both = torch.stack([data, data * 2]).movedim(dim if dim < 0 else dim + 1, 1)
    assert_describes(stats, both)
    assert stats.samples == (2 if dim in (0, -4) else 10)


@pytest.mark.parametrize("dim", [4, -5])
def test_a_dimension_that_is_not_there_is_refused(dim: int) -> None:
    with pytest.raises(OptionError, match=rf"channel_dim={dim} .*\(6, 3, 5, 4\)"):
        dataset_stats([DATA], channel_dim=dim)


@pytest.mark.parametrize(
    ("shape", "way_out"),
    [
        ((2, 28, 28, 1), -1),
        ((2, 28, 28, 3), -1),
        ((2, 28, 28, 4), -1),
        ((2, 8, 28, 28, 3), -1),
        ((2, 8, 3, 28, 28), -3),
        ((3, 28, 28), -3),
        ((1, 28, 28), -3),
    ],
)
def test_what_looks_otherwise_is_refused(shape: tuple[int, ...], way_out: int) -> None:
    data = values(*shape)
    with pytest.raises(StatisticsError, match=rf"channel_dim={way_out} if they are"):
        dataset_stats([data])
    channels = shape[way_out]
    assert len(dataset_stats([data], channel_dim=way_out).mean) == channels


@pytest.mark.parametrize(
    "shape", [(2, 3, 28, 3), (2, 1, 28, 28), (2, 64, 7, 7), (3, 28, 27), (5, 28, 28), (2, 9, 3)]
)
def test_what_looks_as_usual_is_taken(shape: tuple[int, ...]) -> None:
    usual = 2 if len(shape) == 3 else 1
    assert_describes(dataset_stats([values(*shape)]), values(*shape).movedim(usual, 1))


def test_the_first_batch_settles_the_dimension() -> None:
    data = values(6, 8, 8)
    assert_describes(dataset_stats(cut(data, [5, 1])), data.movedim(2, 1))


def test_data_without_channels_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"no dimension for channels.*\[\.\.\., None\]"):
        dataset_stats([values(5)])


LENGTHS = [5, 1, 0, 7]


def padded(channels: int, filler: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences (N, T, C) with padding, their mask (N, T), and all that is real, (K, C)."""
    data = values(len(LENGTHS), max(LENGTHS), channels)
    mask = torch.zeros(data.shape[:2], dtype=torch.long)
    real = []
    for sample, length in enumerate(LENGTHS):
        real.append(data[sample, :length].clone())
        data[sample, length:] = filler
        mask[sample, :length] = 1
    return data, mask, torch.cat(real)


@pytest.mark.parametrize("filler", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]])
def test_padding_does_not_count(filler: float, sizes: list[int]) -> None:
    data, mask, real = padded(3, filler)
    loader = [
        {"attention_mask": m, "input_values": x}
        for x, m in zip(cut(data, sizes), cut(mask, sizes), strict=True)
    ]
    stats = dataset_stats(loader)
    assert_describes(stats, real)
    assert (stats.count, stats.samples) == (13, 4)


DATA_3, MASK, REAL = padded(3, float("nan"))
MASKED = {
    "named": ({"x": DATA_3, "real": MASK}, {"mask": "real"}),
    "bool": ({"x": DATA_3, "attention_mask": MASK.bool()}, {}),
    "any nonzero": ({"x": DATA_3, "attention_mask": MASK * -2.5}, {}),
    "with a channel": ({"x": DATA_3, "attention_mask": MASK[..., None]}, {}),
    "channels first": (
        {"x": DATA_3.transpose(1, 2), "attention_mask": MASK},
        {"channel_dim": 1},
    ),
    "an array": ({"x": DATA_3.numpy(), "attention_mask": MASK.numpy()}, {}),
    "selected": ((DATA_3, MASK == 0), {"select": lambda batch: (batch[0], ~batch[1])}),
    "of text that is embedded": ({"x": DATA_3, "attention_mask": MASK, "input_ids": MASK}, {}),
    "of images": (
        {
            "pixel_values": DATA_3.transpose(1, 2)[..., None],
            "pixel_mask": MASK[..., None],
            "attention_mask": IDS,
            "input_ids": IDS,
        },
        {},
    ),
}


@pytest.mark.parametrize(("batch", "options"), MASKED.values(), ids=MASKED.keys())
def test_masks_come_in_many_ways(batch: Any, options: dict[str, Any]) -> None:
    assert_describes(dataset_stats([batch], **options), REAL)


@pytest.mark.parametrize("at_once", [1, 10])
def test_masks_are_cut_as_their_data(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "AT_ONCE", at_once)
    assert_describes(dataset_stats([{"x": DATA_3, "attention_mask": MASK}]), REAL)


def test_a_sample_alone_may_have_a_mask() -> None:
    loader = [(x.T, m) for x, m in zip(DATA_3, MASK, strict=True)]
    stats = dataset_stats(loader, select=lambda batch: batch, channel_dim=0)
    assert_describes(stats, REAL)
    assert stats.samples == 4


def test_the_mask_of_a_text_is_left_to_the_text() -> None:
    batch = {"pixel_values": DATA, "input_ids": IDS, "attention_mask": IDS * 0}
    assert_describes(dataset_stats([batch]), DATA)


def test_a_mask_can_be_declined() -> None:
    data = values(4, 7, 3)
    assert_describes(
        dataset_stats([{"x": data, "attention_mask": MASK}], mask=None), data.transpose(1, 2)
    )


@pytest.mark.parametrize(
    ("data", "mask", "wanted"),
    [
        (DATA_3, MASK[:, :5], r"\(4, 5\).*takes \(4, 7\)"),
        (DATA_3, MASK[:3], r"\(3, 7\).*takes \(4, 7\)"),
        (DATA_3, MASK[..., None].expand(4, 7, 3), r"\(4, 7, 3\).*takes \(4, 7\)"),
        (DATA_3[..., 0], MASK, r"\(4, 7\).*takes \(4,\).*data\[\.\.\., None\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(data: Tensor, mask: Tensor, wanted: str) -> None:
    for loader, options in (
        ([{"x": data, "attention_mask": mask}], {}),
        ([{"x": data, "attention_mask": mask, "input_ids": IDS}], {}),
        ([{"x": data, "real": mask}], {"mask": "real"}),
        ([(data, mask)], {"select": lambda batch: batch}),
    ):
        with pytest.raises(StatisticsError, match=f"batch 0 .*{wanted}"):
            dataset_stats(loader, **options)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    for name, mask in (("real", "real"), ("attention_mask", "auto")):
        with pytest.raises(StatisticsError, match=f"mask '{name}' is a list, no tensor"):
            dataset_stats([{"x": DATA_3, name: MASK.tolist()}], mask=mask)


def test_padding_everywhere_is_no_data() -> None:
    with pytest.raises(StatisticsError, match="0 values per channel"):
        dataset_stats([{"x": DATA_3, "attention_mask": MASK * 0}])
