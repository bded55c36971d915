"""Small models with running statistics, data for them, and what the statistics are to be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.reference import formulas
from tests.reference.data import close, fill, values

CHANNELS = 3


def one_norm() -> nn.Sequential:
    """A convolution and one norm, in double precision."""
    return nn.Sequential(*fill(nn.Sequential(nn.Conv2d(2, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))))


def net() -> nn.Sequential:
    """Two norms with convolutions, an in-place activation and a dropout around."""
    layers = nn.Sequential(
        nn.Conv2d(2, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
    )
    fill(layers)
    return layers


def images(samples: int, seed: int = 0) -> Tensor:
    """Inputs for the models here."""
    return values(samples, 2, 3, 2, seed=seed)


def cut(data: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The data in batches of given sizes."""
    return list(data.split(list(sizes)))


def kept(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Copies of the statistics that a norm keeps."""
    return norm.running_mean.clone(), norm.running_var.clone()


def assert_keeps(norm: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Assert that a norm keeps these statistics, to 1e-10."""
    close(norm.running_mean, mean)
    close(norm.running_var, var)


def assert_keeps_all_of(norm: nn.Module, inputs: Tensor) -> None:
    """Assert that a norm keeps exact mean and unbiased variance of these inputs of it."""
    assert_keeps(norm, *formulas.mean_and_unbiased_var(inputs))


def really_trained(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of the model whose norms, and nothing else, saw the batches in train mode."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.InstanceNorm2d)):
            module.training = True
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model
