"""What activations and layers make of Gaussian values: against sums over fine grids and draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.norms.elementwise import gaussian_moments, is_elementwise, is_relu
from normswap.norms.statistics.foreseen import foreseen_outputs
from tests.reference.data import close, fill, values


def by_grid(function: Any, mean: float, deviation: float) -> tuple[float, float]:
    """Midpoint sums over a million places, 12 deviations to both sides."""
    width = 24 / 1_000_000
    places = torch.arange(-12 + width / 2, 12, width, dtype=torch.float64)
    share = torch.exp(-(places**2) / 2) / math.sqrt(2 * math.pi) * width
    y = function(mean + deviation * places)
    first = float((y * share).sum())
    return first, float(((y - first) ** 2 * share).sum())


@pytest.mark.parametrize(
    ("function", "slack"),
    [(F.relu, 1e-9), (None, 1e-12), (F.silu, 1e-9), (F.gelu, 1e-9), (F.relu6, 2e-4),
     (F.hardswish, 2e-4), (nn.LeakyReLU(0.1), 2e-4), (torch.tanh, 1e-9)],
    ids=lambda each: getattr(each, "__name__", str(each)),
)  # fmt: skip
def test_mean_and_variance_behind_an_activation(function: Any, slack: float) -> None:
    means, deviations = [0.3, -1.7, 0.0, 2.5], [1.2, 0.6, -0.8, 0.05]
    mean, var = gaussian_moments(function, *torch.tensor([means, deviations], dtype=torch.float64))
    for index, (m, d) in enumerate(zip(means, deviations, strict=True)):
        first, second = by_grid(function or (lambda x: x), m, d)
        assert abs(float(mean[index]) - first) < slack
        assert abs(float(var[index]) - second) < slack


def test_a_channel_that_does_not_vary_stays_where_it_is() -> None:
    mean, var = gaussian_moments(F.relu, values(4), torch.zeros(4).double())
    close(mean, values(4).clamp(min=0))
    close(var, torch.zeros(4).double())


def test_gradients_go_through() -> None:
    def run(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        return gaussian_moments(F.relu, mean, deviation)

    inputs = values(5).requires_grad_(), values(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Linear(4, 6),
     nn.Conv1d(4, 6, 2, stride=2), nn.Conv3d(4, 6, 2, dilation=2)],
    ids=str,
)  # fmt: skip
def test_mean_and_variance_behind_a_layer(layer: Any) -> None:
    """Drawn from independent values, to some percent."""
    fill(layer)
    mean, var = values(4), values(4, seed=1).abs() + 0.2
    dim = layer.weight.ndim - 2
    sizes = {0: (), 1: (8,), 2: (6, 6), 3: (5, 5, 5)}[max(dim, 0)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 4, *sizes, generator=generator, dtype=torch.double)
    shape = (1, -1, *[1] * len(sizes))
    y = layer(mean.view(shape) + var.sqrt().view(shape) * noise)
    dims = (0, *range(2, y.ndim))
    foreseen_mean, foreseen_var = foreseen_outputs(layer, mean, var)
    torch.testing.assert_close(foreseen_mean, y.mean(dims), rtol=0.02, atol=0.1)
    torch.testing.assert_close(foreseen_var, y.var(dims), rtol=0.06, atol=0)


def test_what_is_a_relu_and_what_is_a_plain_activation() -> None:
    assert all(is_relu(f) for f in (nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu))
    assert not any(is_relu(f) for f in (nn.ReLU6(), nn.PReLU(), nn.SiLU(), None, "relu"))
    assert all(is_elementwise(f) for f in (nn.ReLU(), nn.SiLU(), F.gelu, torch.tanh, nn.Hardtanh()))
    refused = (nn.Softmax(1), nn.PReLU(), nn.GLU(1), nn.LogSoftmax(1), nn.Linear(10, 10), None)
    assert not any(is_elementwise(f) for f in refused)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device: str) -> None:
    with torch.device(device):
        assert is_relu(nn.ReLU())
        assert is_elementwise(nn.SiLU())
        assert not is_relu(nn.SiLU())
