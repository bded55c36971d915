"""Functions of single values, which activations are: which one it is, and what it makes of noise.

A norm's output is about Gaussian in each channel, with its bias as the mean and its weight as the
deviation. What an activation makes of the mean and the variance of that is asked by norms that
foresee the statistics of the next layer, or replace the activation too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Elementwise",
    "Function",
    "as_module",
    "gaussian_moments",
    "is_elementwise",
    "is_relu",
    "nodes",
]

#: An activation, as a module or a function of a tensor.
Elementwise = Callable[[Tensor], Tensor]

#: How far from the mean, in deviations, values are looked at, and at how many places.
REACH, PLACES = 8.0, 257


class Function(nn.Module):
    """An activation that is called in a forward, as a module.

    Args:
        function: of a tensor.
    """

    def __init__(self, function: Elementwise) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(input)


def as_module(function: Elementwise) -> nn.Module:
    """An activation as a module of its own."""
    return copy.deepcopy(function) if isinstance(function, nn.Module) else Function(function)


def is_relu(function: object) -> bool:
    """Whether an activation is ReLU, by what it computes."""
    points = _points()
    answer = _tried(function, points)
    return answer is not None and torch.equal(answer, points.clamp(min=0))


def is_elementwise(function: object) -> bool:
    """Whether an activation learns nothing and makes of each value what that value alone tells."""
    points = _points()
    # Of every dimension a part: what looks at other values along one answers otherwise.
    some = (slice(None, None, 2), slice(1, None, 2), slice(None, None, 3), slice(1, None, 2))
    answer, part = _tried(function, points), _tried(function, points[some])
    if answer is None or part is None:
        return False
    return torch.allclose(answer[some], part, rtol=1e-4, atol=1e-6)  # vectors round otherwise


def gaussian_moments(
    function: Elementwise | None, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of an activation of Gaussian values; differentiable.

    Args:
        function: the activation, or ``None`` for none; of `torch.nn.functional.relu`, which has
            a corner, in closed form.
        mean: of the values, of any shape.
        deviation: their standard deviation, likewise, of either sign.

    Returns:
        Two tensors of that shape.
    """
    if function is None:
        return mean, deviation.square()
    if function is F.relu:
        spread = deviation.abs().clamp(min=torch.finfo(mean.dtype).tiny ** 0.5)
        ratio = mean / spread
        below = torch.special.ndtr(ratio)
        density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
        first = mean * below + spread * density
        second = (mean.square() + spread.square()) * below + mean * spread * density
        return first, (second - first.square()).clamp(min=0)
    places, weights = nodes(mean)
    values = function((mean[..., None] + deviation[..., None] * places).contiguous())
    first = (values * weights).sum(-1)
    return first, ((values - first[..., None]).square() * weights).sum(-1)


def nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the standard normal distribution and their probabilities, which sum to one.

    Args:
        like: tells dtype and device.
    """
    places = torch.linspace(-REACH, REACH, PLACES, dtype=like.dtype, device=like.device)
    density = torch.exp(-places.square() / 2)
    return places, density / density.sum()


def _points() -> Tensor:
    """Values of all sizes, (4, 5, 6, 7), on the processor whatever the default device."""
    with torch.device("cpu"):
        ordinary = torch.linspace(-9, 9, 4 * 5 * 6 * 7 - 120)
        sizes = torch.logspace(-30, 6, 60)
        mixed = torch.randperm(4 * 5 * 6 * 7, generator=torch.Generator().manual_seed(0))
        return torch.cat([ordinary, sizes, -sizes])[mixed].view(4, 5, 6, 7)


def _tried(function: Any, points: Tensor) -> Tensor | None:
    """What an activation makes of some points; ``None`` for what learns, or takes no such input."""
    if not callable(function):
        return None
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    with torch.no_grad():
        try:
            answer = function(points.clone())
        except Exception:  # whatever it raises for such an input, it is none that is looked for
            return None
    return answer if isinstance(answer, Tensor) and answer.shape == points.shape else None
