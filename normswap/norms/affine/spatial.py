"""Spatially adaptive normalization: a label map tells gain and offset of every position.

Park, Liu, Wang and Zhu, "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR
2019, arXiv 1903.07291.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.affine.conditioned import ON_ANY_BASE, ByPosition, conv
from normswap.norms.declared import declared
from normswap.norms.entry import Option, whole
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.inputs.maps import Labels

__all__ = [
    "ENTRIES",
    "KERNEL",
    "NUM_LABELS",
    "SpatiallyAdaptiveNorm",
    "is_odd",
    "label_map",
    "zero_conv",
]

HIDDEN = 128


def is_odd(value: Any) -> bool:
    """Whether a value is an odd number, 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1 and value % 2 == 1


NUM_LABELS = whole("num_labels", None, "how many labels there are; has to be given")
KERNEL = Option("kernel_size", 3, "of its convolutions", "an odd number", is_odd)


def zero_conv(dim: int | None, channels: int, out: int, kernel_size: int) -> nn.Module:
    """A convolution that keeps the size, and is zero at first."""
    made: nn.Module = conv(dim)(channels, out, kernel_size, padding=kernel_size // 2)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def label_map(labels: int) -> ExtraInput:
    """A map of so many labels as an extra input."""
    forms = Form(("N", labels, "*"), "numbers"), Form(("N", "*"), "integers", labels)
    return ExtraInput("segmap", forms)


class SpatiallyAdaptiveNorm(ByPosition):
    """(weight + Δw(s)) · z + (bias + Δb(s)), where z is standardized by the base.

    The label map s, resized to the map at hand (nearest), goes through a convolution and a ReLU,
    and from there through one convolution for Δw and one for Δb, which start at zero.

    Args:
        num_features: C.
        num_labels: K.
        hidden_dim: channels between the convolutions. Default 128.
        kernel_size: of the convolutions, odd. Default 3.
        dim: how many dimensions the maps have, 1 to 3. Default 2.
        **rest: as for the base.

    Raises:
        OptionError: num_labels is not given.
    """

    own: tuple[str, ...] = ("label_conv", "gain_conv", "offset_conv")

    def __init__(
        self,
        num_features: int,
        *,
        num_labels: int | None = None,
        hidden_dim: int = HIDDEN,
        kernel_size: int = 3,
        dim: int | None = 2,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, dim=dim, **rest)
        if num_labels is None:
            raise OptionError("give num_labels=, the number of labels in segmap=")
        self.num_labels = num_labels
        self.hidden_dim = hidden_dim
        self.kernel_size = kernel_size
        padding = kernel_size // 2
        self.label_conv = conv(dim)(num_labels, hidden_dim, kernel_size, padding=padding)
        self.gain_conv = zero_conv(dim, hidden_dim, num_features, kernel_size)
        self.offset_conv = zero_conv(dim, hidden_dim, num_features, kernel_size)

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """The label map."""
        return (label_map(self.num_labels),)

    @property
    def deltas(self) -> tuple[str, ...]:
        """The convolutions for gain and offset."""
        return tuple(f"{n}_conv.{t}" for n in ("gain", "offset") for t in ("weight", "bias"))

    def labels(self, x: Tensor) -> Tensor:
        """The label map in the size of x, (N, K, ...)."""
        dtype = self.label_conv.weight.dtype
        return self.resized("segmap", x, Labels(self.num_labels), dtype)

    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolutions make of the label map."""
        hidden = torch.relu(self.label_conv(self.labels(x)))
        return self.gain_conv(hidden), self.offset_conv(hidden)


ENTRIES = (
    declared(
        SpatiallyAdaptiveNorm,
        name="spade",
        aliases=("spatially_adaptive_norm",),
        kind="batch_norm",
        axis="affine",
        pooled="as its base",
        paper="Park et al. 2019, arXiv 1903.07291",
        options=(
            NUM_LABELS,
            whole("hidden_dim", HIDDEN, "channels between its layers"),
            KERNEL,
            *ON_ANY_BASE,
        ),
        inputs=("segmap",),
        needs={"dim"},
    ),
)
