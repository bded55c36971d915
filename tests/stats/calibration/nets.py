"""Models and data to calibrate on, in double precision and eval mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from tests.reference.data import fill, values

NORMS = ["1", "4"]


def images(samples: int, seed: int = 0) -> Tensor:
    """Inputs of the convolutional models here."""
    return values(samples, 3, 4, 4, seed=seed)


def batches(count: int = 5, size: int = 8) -> list[Tensor]:
    """So many batches of images."""
    return list(images(count * size).split(size))


def settled(model: nn.Module, data: Tensor) -> nn.Module:
    """The model in eval mode, with the running statistics of its data in one batch."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(data)
    return model.eval()


def conv_net() -> nn.Sequential:
    """Two BatchNorms with learnt affines, some gains negative, between convolutions."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    fill(model)
    settled(model, images(40))
    return model


def grouped() -> nn.Sequential:
    """One GroupNorm, which keeps no running statistics."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    fill(model)
    return model.eval()


def pair_of(original: nn.Module, to: str = "gn", **options: object) -> tuple[nn.Module, nn.Module]:
    """A converted copy of a model, and the model."""
    if to == "gn":
        options = {"num_groups": 2} | options
    return normswap.convert(copy.deepcopy(original), to, **options), original


def affines(model: nn.Module) -> list[Tensor]:
    """The gains and offsets of the converted norms."""
    norms = [model.get_submodule(row.path) for row in normswap.report(model)]
    tensors = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return [tensor.detach().clone() for tensor in tensors if tensor is not None]


def bits(model: nn.Module) -> dict[str, list[int]]:
    """The state dict, to the bit."""
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).tolist()
        for name, tensor in model.state_dict().items()
        if tensor.ndim
    }
