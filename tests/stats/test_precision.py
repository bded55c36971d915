"""Statistics in half precision, under autocast, and of data far from zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference import formulas
from tests.reference.data import values
from tests.stats.models import cut

HALVES = [torch.bfloat16, torch.float16]


def far(samples: int, dtype: torch.dtype) -> Tensor:
    """Data whose sums half precision cannot hold."""
    return (values(samples, 2, 4, 4) + 10).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(2), nn.InstanceNorm2d(2, affine=True, track_running_stats=True)]
)
def test_a_model_in_half_precision_gets_the_nearest_halves(
    norm: nn.Module, dtype: torch.dtype
) -> None:
    model, data = norm.to(dtype), far(512, dtype)
    normswap.warmup(model, cut(data, [64] * 8))
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = formulas.mean_and_unbiased_var(data.double())
    else:
        mean, var = data.double().mean((0, 2, 3)), data.double().var((2, 3)).mean(0)
    assert torch.equal(model.running_mean, mean.to(dtype))
    assert torch.equal(model.running_var, var.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_in_half_precision_stays_so(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).to(dtype)
    outputs = []
    model[1].register_forward_hook(lambda module, args, y: outputs.append(y.dtype))
    normswap.warmup(model, [far(8, dtype)])
    assert outputs == [dtype]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype, torch.long}


def test_single_precision_is_accumulated_in_double() -> None:
    norm, data = nn.BatchNorm2d(2), far(512, torch.float32)
    normswap.warmup(norm, cut(data, [2] * 256))
    mean, var = formulas.mean_and_unbiased_var(data.double())
    torch.testing.assert_close(norm.running_mean, mean.float(), rtol=3e-7, atol=0)
    torch.testing.assert_close(norm.running_var, var.float(), rtol=3e-7, atol=0)


def test_data_far_from_zero_keeps_its_variance() -> None:
    norm, data = nn.BatchNorm2d(2).double(), 1e3 + 1e-2 * values(96, 2, 4, 4)
    normswap.warmup(norm, cut(data, [1, 7, 64, 24]))
    _, var = formulas.mean_and_unbiased_var(data)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-6, atol=0)


class Overwriting(nn.BatchNorm2d):
    """Leaves its output where its input was."""

    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(super().forward(x))


def cleared_by_a_hook() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.register_forward_hook(lambda module, args, y: args[0].zero_().sum() * 0 + y)
    return norm


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [lambda: Overwriting(2), cleared_by_a_hook])
def test_an_input_that_is_overwritten_is_measured_as_it_came(
    make: Callable[[], nn.Module], layout: torch.memory_format, grad: Callable[[], Any]
) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with grad():
            return model(batch.clone())

    norm, data = make(), (values(24, 2, 6, 6) + 2000).float().contiguous(memory_format=layout)
    normswap.warmup(norm, cut(data, [8, 8, 8]), forward=forward)
    mean, var = formulas.mean_and_unbiased_var(data.double())
    torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var, var.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("amp", [torch.bfloat16, True])
def test_autocast_is_the_forwards(amp: torch.dtype | bool) -> None:
    model, data = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), far(32, torch.float32)
    normswap.warmup(model, cut(data, [16, 16]), amp=amp)
    with torch.autocast("cpu"), torch.no_grad():
        inputs = model[0](data)
    assert inputs.dtype == torch.bfloat16
    mean, var = formulas.mean_and_unbiased_var(inputs.double())
    torch.testing.assert_close(model[1].running_mean, mean.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, var.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("amp", [None, False])
def test_without_amp_there_is_no_autocast(amp: bool | None) -> None:
    dtypes = []
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model[1].register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    normswap.warmup(model, [far(8, torch.float32)], amp=amp)
    assert dtypes == [torch.float32]


def test_autocast_ends_with_the_pass() -> None:
    normswap.warmup(nn.BatchNorm2d(2), [far(8, torch.float32)], amp=torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
