"""What can be foreseen of a layer's output from the norm before the layer.

That norm's output is taken as Gaussian in each channel, with its bias as the mean and its weight
as the deviation, and as independent of all else. So the mean and the variance follow of what the
layer is given, through the activation between the two, and of what the layer makes of it; the
border of zeros round a map is left out of account.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.norms.beside import Previous
from normswap.norms.elementwise import Elementwise, gaussian_moments, is_elementwise, is_relu
from normswap.norms.plain import PlainNorm
from normswap.norms.statistics.frozen import FrozenBatchNorm

__all__ = [
    "foreseen_inputs",
    "foreseen_outputs",
    "functions_between",
    "standardizes_channels",
    "why_unforeseen",
]


def functions_between(previous: Previous) -> list[Elementwise]:
    """The activations between a norm and the next layer; a ReLU of any kind is torch's function."""
    return [F.relu if is_relu(function) else function for function in previous.functions]


def why_unforeseen(previous: Previous, layer: Any) -> str:
    """Why nothing can be foreseen of a layer's output; empty if something can."""
    if previous.norm is None or previous.problem:
        return previous.problem or "there is no norm before it"
    if not standardizes_channels(previous.norm):
        return "the norm before does not standardize each channel by itself"
    functions = functions_between(previous)
    if not all(is_elementwise(each) for each in functions):
        return "what stands between it and the norm before is no plain activation"
    names = ("in_channels", "in_features")
    inputs = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    size = _size(previous.norm)
    return "" if size == inputs else "the norm before has other channels than the layer between"


def standardizes_channels(norm: nn.Module) -> bool:
    """Whether a norm's weight and bias are deviation and mean of what comes out of it."""
    if isinstance(norm, PlainNorm):
        tracks = getattr(norm, "running_mean", None) is not None
        return norm.pools(tracks=tracks).train.by_channel
    return isinstance(norm, (_BatchNorm, _InstanceNorm, FrozenBatchNorm))


def foreseen_inputs(norm: Any, functions: list[Elementwise], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what a layer is given, two tensors (in channels,); differentiable.

    Args:
        norm: the norm before it.
        functions: what stands between, in order, see `functions_between`.
        like: tells dtype and device.
    """
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    size = _size(norm) or 0
    deviation = like.new_ones(size) if weight is None else weight.to(like)
    mean = like.new_zeros(size) if bias is None else bias.to(like)
    if isinstance(norm, PlainNorm):
        deviation, mean = norm.counts.applied(deviation, mean)
    if not functions:
        return gaussian_moments(None, mean, deviation)
    whole = functions[0] if len(functions) == 1 else _Chain(functions)
    return gaussian_moments(whole, mean, deviation)


def foreseen_outputs(layer: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a convolution's or a linear's output, two tensors (out channels,).

    Args:
        layer: the layer, not transposed.
        mean: of its inputs, (in channels,).
        var: of its inputs, likewise.
    """
    weight = layer.weight.to(mean)
    groups = getattr(layer, "groups", 1)
    first = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    second = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight.square()

    def applied(filters: Tensor, values: Tensor) -> Tensor:
        by_group = filters.view(groups, -1, filters.shape[1])
        return torch.bmm(by_group, values.view(groups, -1, 1)).flatten()

    out = applied(first, mean)
    return out if layer.bias is None else out + layer.bias.to(mean), applied(second, var)


class _Chain:
    """Several functions of single values, one after another."""

    def __init__(self, functions: list[Elementwise]) -> None:
        self.functions = functions

    def __call__(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


def _size(norm: Any) -> int | None:
    """How many channels a norm has."""
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return int(getattr(norm, name))
    shape = getattr(norm, "normalized_shape", None)
    return None if shape is None else math.prod(shape)
