"""What of a loader reaches the model."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.errors import OptionError
from tests.stats.models import assert_keeps_all_of, cut, images

Pair = namedtuple("Pair", ["image", "label"])


class Scaled(nn.Module):
    """Takes an image, and a scale if it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2).double()

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(image * scale)


DATA = images(6)
LABELS = torch.arange(6)
PARTS = list(zip(cut(DATA, [4, 2]), cut(LABELS, [4, 2]), strict=True))
LOADERS = {
    "tensors": [x for x, _ in PARTS],
    "tuples": PARTS,
    "lists": [list(part) for part in PARTS],
    "named tuples": [Pair(*part) for part in PARTS],
    "mappings": [{"image": x, "label": y} for x, y in PARTS],
    "other mappings": [UserDict({"label": y, "image": x}) for x, y in PARTS],
    "a generator": (x for x, _ in PARTS),
    "a data loader": DataLoader(TensorDataset(DATA, LABELS), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_the_model_gets_the_images(loader: Any) -> None:
    model = Scaled()
    normswap.warmup(model, loader)
    assert_keeps_all_of(model.norm, DATA)


def test_of_a_mapping_the_forward_gets_all_that_it_takes() -> None:
    model = Scaled()
    normswap.warmup(model, [{"image": DATA, "scale": 3.0, "label": LABELS}])
    assert_keeps_all_of(model.norm, DATA * 3)


def test_a_forward_that_takes_any_keyword_gets_the_whole_mapping() -> None:
    class Open(Scaled):
        def forward(self, **inputs: Any) -> Tensor:  # type: ignore[override]
            assert inputs.keys() == {"image", "label"}
            return super().forward(inputs["image"])

    model = Open()
    normswap.warmup(model, [{"image": DATA, "label": LABELS}])
    assert_keeps_all_of(model.norm, DATA)


class HandsOn(nn.Module):
    """Takes whatever the model inside takes, as timm's ModelEmaV3 does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        AveragedModel,
        HandsOn,
        lambda model: HandsOn(AveragedModel(model)),
        lambda model: HandsOn(nn.DataParallel(model)),
    ],
    ids=["averaged", "hands on", "both", "around parallel"],
)
def test_a_wrapper_gets_what_the_model_inside_takes(wrap: Callable[[nn.Module], Any]) -> None:
    model = wrap(Scaled())
    normswap.warmup(model, [{"image": DATA, "scale": 3.0, "label": LABELS}])
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert_keeps_all_of(norm, DATA * 3)


def test_a_wrapper_around_nothing_that_fits_is_refused() -> None:
    with pytest.raises(OptionError, match=r"takes none of .*'pixels'.*forward="):
        normswap.warmup(AveragedModel(Scaled()), [{"pixels": DATA}])


def test_a_model_that_names_a_parameter_gets_the_whole_mapping() -> None:
    class Labelled(HandsOn):
        def forward(self, label: Tensor, **inputs: Any) -> Any:  # type: ignore[override]
            assert inputs.keys() == {"image", "extra"}
            return self.module(inputs["image"])

    model = Labelled(Scaled())
    normswap.warmup(model, [{"image": DATA, "label": LABELS, "extra": LABELS}])
    assert_keeps_all_of(model.module.norm, DATA)


class Features(UserDict[str, Any]):
    """A batch that knows more than its items, as those of processors do."""

    def __init__(self, items: dict[str, Any], *, kind: str) -> None:
        super().__init__(items)
        self.kind = kind


class Record(dict[str, Any]):
    """The same of a dict."""

    def __init__(self, items: dict[str, Any], *, kind: str) -> None:
        super().__init__(items)
        self.kind = kind


class Frozen(dict[str, Any]):
    """Cannot be made anew."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("frozen")


@pytest.mark.parametrize("method", ["pooled", "population"])
@pytest.mark.parametrize("make", [Features, Record])
def test_forward_gets_the_type_that_the_loader_yields(
    make: Callable[..., Any], method: str
) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        assert (type(batch), batch.kind) == (make, "x-ray")
        assert batch["image"] is not DATA or method == "pooled"
        return model(batch["image"])

    model, batch = Scaled(), make({"image": DATA}, kind="x-ray")
    normswap.warmup(model, [batch], forward=forward, method=method)
    assert_keeps_all_of(model.norm, DATA)
    assert batch["image"] is DATA


def test_a_mapping_that_cannot_be_made_anew_comes_as_a_dict() -> None:
    model, types = Scaled(), []

    def forward(model: nn.Module, batch: Any) -> Any:
        types.append(type(batch))
        return model(batch["image"])

    normswap.warmup(model, [Frozen({"image": DATA})], forward=forward)
    assert types == [dict]
    assert_keeps_all_of(model.norm, DATA)


def test_a_mapping_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(OptionError, match=r"Scaled takes none of .*'pixels'.*forward="):
        normswap.warmup(Scaled(), [{"pixels": DATA}])


def test_forward_feeds_everything_else() -> None:
    model = Scaled()
    normswap.warmup(
        model,
        [(LABELS, {"deep": DATA})],
        forward=lambda model, batch: model(batch[1]["deep"], scale=2.0),
    )
    assert_keeps_all_of(model.norm, DATA * 2)


class Loader:
    """Counts how many batches were asked of it."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in cut(DATA, [1, 2, 3]):
            self.asked += 1
            yield batch


@pytest.mark.parametrize(
    ("budget", "batches"),
    [
        ({"batches": 1}, 1),
        ({"batches": 2}, 2),
        ({"batches": 99}, 3),
        ({"samples": 1}, 1),
        ({"samples": 2}, 2),
        ({"samples": 3}, 2),
        ({"samples": 4}, 3),
        ({"batches": 2, "samples": 99}, 2),
        ({"batches": 3, "samples": 1}, 1),
    ],
)
def test_a_budget_ends_the_reading(budget: dict[str, int], batches: int) -> None:
    model, loader = Scaled(), Loader()
    report = normswap.warmup(model, loader, **budget)
    samples = [1, 3, 6][batches - 1]
    assert loader.asked == report.batches == batches
    assert report.samples == samples
    assert_keeps_all_of(model.norm, DATA[:samples])


@pytest.mark.parametrize("name", ["batches", "samples"])
@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_refused(name: str, budget: int) -> None:
    with pytest.raises(OptionError, match=f"{name}={budget}"):
        normswap.warmup(Scaled(), [DATA], **{name: budget})


@pytest.mark.parametrize("kind", ["tuples", "mappings", "named tuples"])
def test_the_samples_of_any_batch_are_counted(kind: str) -> None:
    assert normswap.warmup(Scaled(), LOADERS[kind]).samples == 6


def test_batches_are_moved_to_the_device_of_the_model() -> None:
    class Where(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2, device="meta")
            self.seen = set[str]()

        def forward(self, batch: Tensor) -> Tensor:
            self.seen.add(batch.device.type)
            raise LookupError

    model = Where()
    with pytest.raises(LookupError):
        normswap.warmup(model, [(DATA, LABELS)])
    assert model.seen == {"meta"}


def test_batches_are_moved_to_a_device_that_is_given() -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append([batch["image"].device.type, batch["more"][0].device.type])
        raise LookupError

    with pytest.raises(LookupError):
        normswap.warmup(
            Scaled(), [{"image": DATA, "more": (LABELS,)}], forward=forward, device="meta"
        )
    assert seen == [["meta", "meta"]]


def test_a_loader_that_can_be_read_once_is_read_once() -> None:
    model = Scaled()
    normswap.warmup(model, iter(cut(DATA, [4, 2])))
    assert_keeps_all_of(model.norm, DATA)
