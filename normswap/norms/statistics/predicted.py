"""Statistics of an earlier batch, brought to the present weights of the layer that they are of.

To first order a channel's mean and variance change with its filter by derivatives that follow from
the layer being linear in it: the mean patch, and twice the mean of the patches each weighed by how
far the output there is from its mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PastBatch", "derivatives"]


@dataclass(frozen=True)
class PastBatch:
    """One batch's statistics, with what they were taken by.

    Args:
        mean: (C,).
        var: (C,), biased.
        dmean: derivative of each channel's mean by its filter, of the weight's shape.
        dvar: derivative of its variance, likewise.
        weight: the layer's weight.
        bias: the layer's bias, or ``None``.
        version: how often the weight had been written to.
    """

    mean: Tensor
    var: Tensor
    dmean: Tensor
    dvar: Tensor
    weight: Tensor
    bias: Tensor | None
    version: int

    def detached(self) -> PastBatch:
        """The same as plain values."""
        return replace(self, mean=self.mean.detach(), var=self.var.detach())

    def by(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) as they would be by the layer's present weight and bias.

        The mean square is predicted to first order too, so that the variance, which is what
        exceeds the square of the mean, may be below zero.
        """
        change = layer.weight.detach().to(self.weight) - self.weight
        shift = (self.dmean * change).flatten(1).sum(1)
        var = self.var + (self.dvar * change).flatten(1).sum(1) - shift.square()
        mean = self.mean + shift
        if self.bias is not None:
            mean = mean + (layer.bias.detach().to(self.bias) - self.bias)
        return mean, var


def derivatives(layer: Any, fed: Tensor, output: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of each channel's mean and variance by its filter, of the weight's shape.

    Args:
        layer: a convolution, not transposed, or a linear.
        fed: what it was given.
        output: what it made of it, without positions of other samples.
        mean: the output's mean by channel, (C,); the variance is round it.
    """
    weight: Tensor = layer.weight
    fed, output = fed.to(mean.dtype), output.to(mean.dtype)
    count = max(output.numel() // len(weight), 1)
    with torch.autocast(fed.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            patches = fed.reshape(-1, weight.shape[1])
            away = output.reshape(-1, len(weight)) - mean
            return (patches.sum(0) / count).expand_as(weight), away.mT @ patches * (2 / count)
        away = (output - mean.view(-1, *[1] * (weight.ndim - 2))) * (2 / count)
        even = torch.full_like(output, 1 / count).narrow(-weight.ndim + 1, 0, layer.groups)
        by_group = _by_weight(layer, fed, even, weight[: layer.groups])
        dmean = by_group.repeat_interleave(len(weight) // layer.groups, 0)
        return dmean, _by_weight(layer, fed, away, weight)


def _by_weight(layer: Any, fed: Tensor, upstream: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a convolution by its weight."""
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        fed = F.pad(fed, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * (weight.ndim - 2)
    if fed.ndim < weight.ndim:  # one sample without a batch
        fed, upstream = fed[None], upstream[None]
    stride, dilation, none = layer.stride, layer.dilation, [0] * (weight.ndim - 2)
    wanted = [False, True, False]
    gradient: Tensor = torch.ops.aten.convolution_backward(
        upstream.contiguous(), fed, weight.detach().to(fed.dtype), None,
        stride, padding, dilation, False, none, layer.groups, wanted,
    )[1]  # fmt: skip
    return gradient
