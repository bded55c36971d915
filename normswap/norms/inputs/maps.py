"""Extra inputs of positions in the size of a norm's map: nearest, as torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.errors import CannotConvert, InputError
from normswap.norms.state import NormState

__all__ = ["Labels", "refuse_untold", "resized"]


def resized(value: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, K, ...) in another size; integers and booleans become floating point.

    Raises:
        InputError: it has another number of dimensions than the map.
    """
    if value.ndim - 2 != len(size):
        raise InputError(
            f"an extra input of shape {tuple(value.shape)} has {value.ndim - 2} dimensions of "
            f"positions, and the map of a norm has {len(size)}"
        )
    values = value if value.is_floating_point() else value.float()
    return values if value.shape[2:] == size else F.interpolate(values, size=size, mode="nearest")


def refuse_untold(state: NormState) -> None:
    """Raise unless it is known how many dimensions a source's map has.

    Raises:
        CannotConvert: it is not.
    """
    if state.flattens or state.dim not in (1, 2, 3):
        raise CannotConvert(
            "nothing tells how many dimensions its map has, that an input of positions would be "
            "resized to",
            "give example_inputs",
        )


class Labels:
    """A label map as one map for each label, in another size.

    Args:
        count: how many labels there are, K.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, value: Tensor, size: tuple[int, ...]) -> Tensor:
        """(N, K, ...) of any numbers, or labels (N, ...), in another size as (N, K, ...)."""
        if value.is_floating_point() or value.dtype == torch.bool:
            return resized(value, size)
        labels = resized(value[:, None].double(), size)[:, 0].long()
        return F.one_hot(labels, self.count).movedim(-1, 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and other.count == self.count

    def __hash__(self) -> int:
        return hash((Labels, self.count))
