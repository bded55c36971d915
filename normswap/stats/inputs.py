"""What of a loader's batches is measured: values per channel, and which of them count."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.errors import NormSwapError, OptionError, StatisticsError, did_you_mean

__all__ = ["Inputs", "Select"]

#: Takes out of a batch what is measured: a tensor, or a tensor and its mask.
Select = Callable[[Any], Any]

#: Where mappings keep images and sound; these come before any other entry.
_USUAL = ("pixel_values", "image", "images", "input_features", "input_values")
#: Where the processors of Hugging Face tell, by nonzero, what is real and not padding.
_MASKS = ("pixel_mask", "attention_mask")
#: As many channels make an image.
_IMAGE = (1, 3, 4)


@dataclass(frozen=True)
class Inputs:
    """A loader that yields values (N, C, ...) with a mask (N, ...) or ``None`` for each batch.

    Args:
        loader: any iterable of batches.
        key: as for `normswap.dataset_stats`.
        mask: likewise.
        select: likewise.
        channel_dim: likewise.
    """

    loader: Iterable[Any]
    key: str | None
    mask: str | None
    select: Select | None
    channel_dim: int | None

    def __post_init__(self) -> None:
        if self.select is not None and (self.key is not None or self.mask not in ("auto", None)):
            raise OptionError("select= takes values and mask out of a batch: give no key=, mask=")

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        # Settled by the first batch: one that is smaller may look like something else.
        dims: dict[int, int] = {}
        for index, batch in enumerate(self.loader):
            try:
                entries, key, mask_key = self._entries(batch)
                data = _numbers(entries[key])
                if data.ndim not in dims:
                    dims[data.ndim] = _channel_dim(tuple(data.shape), self.channel_dim)
                dim = dims[data.ndim]
                mask = _mask(entries, mask_key, data, dim)
            except NormSwapError as error:
                raise type(error)(f"batch {index} (counted from 0): {error}") from None
            yield _samples_first(data, mask, dim)

    def _entries(self, batch: Any) -> tuple[Mapping[str, Any], str, str | None]:
        """A batch as a mapping, with the keys of its values and of its mask."""
        if self.select is not None:
            chosen = self.select(batch)
            pair = isinstance(chosen, tuple) and len(chosen) == 2
            data, mask = chosen if pair else (chosen, None)
            return {"data": data, "mask": mask}, "data", None if mask is None else "mask"
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Mapping):
            return batch, _key(batch) if self.key is None else _known(batch, self.key), self.mask
        for name, value in (("key", self.key), ("mask", self.mask)):
            if value not in ("auto", None):
                raise OptionError(
                    f"{name}={value!r} names an entry of a mapping, and this is a "
                    f"{type(batch).__name__}; give select=f(batch) -> data or (data, mask)"
                )
        return {"data": batch}, "data", None


def _key(batch: Mapping[str, Any]) -> str:
    """The entry that is measured where none is named."""
    keys = [key for key, value in batch.items() if _may_be_data(str(key), value)]
    if not keys:
        raise OptionError(
            f"none of the entries {_names(batch)} is a tensor of floating point or uint8 numbers "
            "with two dimensions or more, masks left out; name one by key="
        )
    return min(keys, key=lambda key: _USUAL.index(key) if key in _USUAL else len(_USUAL))


def _may_be_data(key: str, value: Any) -> bool:
    tensor = None if key.endswith("mask") else _tensor(value)
    return tensor is not None and tensor.ndim > 1 and _measurable(tensor)


def _known(batch: Mapping[str, Any], key: str) -> str:
    if key not in batch:
        names = _names(batch)
        raise OptionError(f"no entry {key!r} among {names}.{did_you_mean(key, names)}")
    return key


def _names(batch: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, batch))


def _tensor(value: Any) -> Tensor | None:
    """A tensor or an array of NumPy as a tensor; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return value
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError):  # strings and objects; strides that torch does not have
        return None


def _measurable(data: Tensor) -> bool:
    return data.is_floating_point() or data.dtype == torch.uint8


def _numbers(value: Any) -> Tensor:
    data = _tensor(value)
    if data is None:
        raise StatisticsError(
            f"a {type(value).__name__} is no tensor, nor an array that can be one; "
            "give select=f(batch) -> data or (data, mask)"
        )
    if not _measurable(data):
        raise StatisticsError(
            f"data of {data.dtype} has no range that is certain; convert it, such as by "
            "select=lambda batch: batch[0].double() / 65535"
        )
    return data


def _channel_dim(shape: tuple[int, ...], asked: int | None) -> int:
    """Where the channels are in data of a shape."""
    ndim = len(shape)
    if asked is not None:
        if not -ndim <= asked < ndim:
            raise OptionError(f"channel_dim={asked} is no dimension of data of shape {shape}")
        return asked % ndim
    if ndim < 2:
        raise StatisticsError(
            f"data of shape {shape} has no dimension for channels; add one, such as by "
            "select=lambda batch: batch[..., None]"
        )
    usual = 2 if ndim == 3 else 1
    others: tuple[int, ...] = (-1, -3) if ndim > 3 else ()
    if ndim == 3 and shape[1] == shape[2]:  # a sequence as long as wide, or a single image
        others = (-3,)
    looks = [other for other in others if shape[other] in _IMAGE]
    if looks and shape[usual] not in _IMAGE:
        raise StatisticsError(
            f"data of shape {shape} looks as if its channels were in dimension {looks[0]}; "
            f"say channel_dim={looks[0]} if they are, or else channel_dim={usual}"
        )
    return usual


def _mask(entries: Mapping[str, Any], key: str | None, data: Tensor, dim: int) -> Tensor | None:
    """Which values of the data are real; ``None`` for all."""
    if key is None:
        return None
    if key != "auto":
        return _real(_known(entries, key), entries[key], data, dim)
    text = _tensor(entries.get("input_ids"))
    for name in _MASKS:
        mask = entries.get(name)
        if mask is not None and not _is_of(text, mask, data, dim):
            return _real(name, mask, data, dim)
    return None


def _is_of(text: Tensor | None, mask: Any, data: Tensor, dim: int) -> bool:
    """Whether a mask is that of a text that comes with the data, and none of the data."""
    mask = _tensor(mask)
    if text is None or mask is None or mask.shape != text.shape:
        return False
    return _without_channels(mask, data, dim) is None


def _real(name: str, value: Any, data: Tensor, dim: int) -> Tensor:
    """Which values are real by a mask, in the shape of the data without channels."""
    mask = _tensor(value)
    if mask is None:
        raise StatisticsError(
            f"the mask {name!r} is a {type(value).__name__}, no tensor; convert it, or give "
            "mask=None to count all values"
        )
    fitted = _without_channels(mask, data, dim)
    if fitted is None:
        raise StatisticsError(
            f"the mask {name!r} has the shape {tuple(mask.shape)}, and data of shape "
            f"{tuple(data.shape)} with its channels in dimension {dim} takes "
            f"{tuple(data.shape[:dim] + data.shape[dim + 1 :])}; say channel_dim= if they are "
            "elsewhere, mask=None to count all values, or shape both by "
            "select=f(batch) -> (data, mask), such as data[..., None] if there are no channels"
        )
    return fitted != 0


def _without_channels(mask: Tensor, data: Tensor, dim: int) -> Tensor | None:
    """A mask in the shape of the data without channels; ``None`` if it has another."""
    if mask.ndim == data.ndim and mask.shape[dim] == 1:
        mask = mask.squeeze(dim)
    return mask if mask.shape == data.shape[:dim] + data.shape[dim + 1 :] else None


def _samples_first(data: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Values as (N, C, ...) and their mask as (N, ...)."""
    if dim == 0:  # one sample, without a dimension for samples
        return data[None], None if mask is None else mask[None]
    return data.movedim(dim, 1), mask
