"""Adaptive convolution-based normalization: standardize locally, convolve as a style says.

Cho, Kim, Kim, Kim and Choo, "Unpaired Image Translation via Adaptive Convolution-based
Normalization", 2019, arXiv 1911.13271. No code was published; what is computed here follows from
the abstract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.affine.spatial import is_odd
from normswap.norms.affine_norm import AffineNorm
from normswap.norms.declared import declared
from normswap.norms.entry import Option, whole
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.inputs.maps import refuse_untold
from normswap.norms.inputs.norm import InputNorm
from normswap.norms.pool import Over, Pool, Rule
from normswap.norms.start import Carry
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "AdaptiveConvolutionNorm"]


@dataclass(frozen=True)
class _Window(Pool):
    """The positions around each, of one sample's channel.

    Args:
        window: how many there are in every dimension.
    """

    over: Over = "group"
    window: int = 3


class AdaptiveConvolutionNorm(InputNorm, AffineNorm):
    """A convolution of z with a filter for each sample's channel, and an offset.

    z is standardized by mean and biased variance of the window around each position, in its own
    channel; what is beyond the border does not count. The filter is ``weight`` at its centre and
    zero elsewhere, the offset ``bias``, and what a linear layer of the style adds to either
    starts at zero. Beyond the border z is zero.

    Args:
        num_features: C.
        style_dim: S, the size of a style vector.
        kernel_size: of window and filter, odd, 3 or more. Default 3.
        dim: how many dimensions the maps have, 1 to 3. Default 2.
        **rest: as for `AffineNorm`; eps is added to the variance.

    Raises:
        OptionError: style_dim is not given.
        DegeneratePooling: at a forward on maps of one position.
    """

    own = ("filter_linear", "offset_linear")
    spatial = True

    def __init__(
        self,
        num_features: int,
        *,
        style_dim: int | None = None,
        kernel_size: int = 3,
        dim: int = 2,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, dim=dim, **rest)
        if style_dim is None:
            raise OptionError("give style_dim=, the size of a style vector")
        self.map_dim = dim
        self.style_dim = style_dim
        self.kernel_size = kernel_size
        self.filter_linear = nn.Linear(style_dim, num_features * kernel_size**dim)
        self.offset_linear = nn.Linear(style_dim, num_features)
        for layer in (self.filter_linear, self.offset_linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def chosen(cls, state: NormState, carry: Carry, **given: Any) -> dict[str, Any]:
        """Refuse a map whose dimensions nothing tells, as a filter has to fit them."""
        refuse_untold(state)
        return super().chosen(state, carry, **given)

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """A style vector."""
        return (ExtraInput("style", (Form(("N", self.style_dim), "numbers"),)),)

    @property
    def deltas(self) -> tuple[str, ...]:
        """Both linear layers."""
        return tuple(f"{layer}.{t}" for layer in self.own for t in ("weight", "bias"))

    def pools(self, *, tracks: bool) -> Rule:
        """A window of one sample's channel."""
        return Rule.always(_Window(window=self.kernel_size))

    def standardize(self, x: Tensor) -> Tensor:
        """Standardize by the window around each position."""
        self.refuse_single_value(x[0, 0].numel() if len(x) else 0, "use a larger map")
        inside = self._windows(torch.ones_like(x[:1, :1]))
        count = inside.sum(-1)
        windows = self._windows(x)
        mean = windows.sum(-1) / count
        away = (windows - mean[..., None]) * inside
        var = away.square().sum(-1) / count
        return (x - mean) * (var + self.eps).rsqrt()

    def with_affine(self, z: Tensor) -> Tensor:
        """Convolve each sample's channel with its filter."""
        _, style = self.called_with("style", z)
        style = style.to(self.filter_linear.weight.dtype)
        samples, kernel = len(z), [self.kernel_size] * self.map_dim
        filters = self.filter_linear(style).view(samples, self.num_features, -1).to(z.dtype)
        weight = z.new_ones(self.num_features) if self.weight is None else self.weight
        centre = F.one_hot(torch.tensor(filters.shape[2] // 2, device=z.device), filters.shape[2])
        filters = filters + weight.to(z.dtype)[:, None] * centre.to(z.dtype)
        offset = self.offset_linear(style).to(z.dtype)
        if self.bias is not None:
            offset = offset + self.bias.to(z.dtype)
        channels = samples * self.num_features
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.map_dim - 1]
        y: Tensor = convolve(
            z.reshape(1, channels, *z.shape[2:]),
            filters.reshape(channels, 1, *kernel),
            offset.reshape(-1),
            padding=self.kernel_size // 2,
            groups=channels,
        )
        return y.view(z.shape)

    def _windows(self, x: Tensor) -> Tensor:
        """The values around each position, (N, C, ..., window), zeros beyond the border."""
        windows = F.pad(x, [self.kernel_size // 2] * (2 * self.map_dim))
        for dim in range(2, x.ndim):
            windows = windows.unfold(dim, self.kernel_size, 1)
        return windows.flatten(x.ndim)


def _is_window(value: Any) -> bool:
    return is_odd(value) and bool(value >= 3)


ENTRIES = (
    declared(
        AdaptiveConvolutionNorm,
        name="adacon",
        aliases=("adaptive_convolution_norm",),
        kind="local_norm",
        axis="affine",
        pooled="a window of H·W, per sample, channel and position",
        paper="Cho et al. 2019, arXiv 1911.13271",
        options=(
            whole("style_dim", None, "size of a style vector; has to be given"),
            Option("kernel_size", 3, "of window and filter", "an odd number from 3", _is_window),
        ),
        inputs=("style",),
        needs={"dim"},
    ),
)
