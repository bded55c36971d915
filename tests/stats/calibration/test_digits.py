"""On real data: a small convolutional net for digits, BatchNorm turned to GroupNorm."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.calibration import relative_error

TRAINING = 1200


@dataclass(frozen=True)
class Trained:
    """A trained net, and images that it has and has not seen."""

    model: nn.Module
    seen: Tensor
    unseen: Tensor
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the unseen images that are told right."""
        return float((outputs(model, self.unseen).argmax(1) == self.labels).double().mean() * 100)

    def error(self, model: nn.Module) -> float:
        """Relative error of the outputs for unseen images."""
        return relative_error(outputs(model, self.unseen), outputs(self.model, self.unseen))


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def five_layers() -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, stride in ((1, 1), (32, 1), (32, 2), (32, 1), (32, 1)):
        layers.append(nn.Conv2d(channels, 32, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@pytest.fixture(scope="module")
def trained() -> Trained:
    """The net after six passes over 1200 digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, digits = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(digits)[order]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(2)
        model = five_layers()
        optimizer = torch.optim.Adam(model.parameters())
        parts = -(-TRAINING // 64)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=6 * parts)
        for _ in range(6):
            for rows in torch.randperm(TRAINING).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
                rate.step()
    return Trained(model.eval(), images[:TRAINING], images[TRAINING:], labels[TRAINING:])


@pytest.mark.parametrize("num_groups", [1, 2, 8, 32])
def test_groups_of_any_number_are_near_the_original(trained: Trained, num_groups: int) -> None:
    free = normswap.convert(copy.deepcopy(trained.model), "gn", num_groups=num_groups)
    fitted = normswap.convert(
        copy.deepcopy(trained.model), "gn", num_groups=num_groups, calibrate=trained.seen.split(64)
    )
    assert trained.accuracy(trained.model) > 98
    assert trained.error(fitted) < 0.95 * trained.error(free)
    assert trained.accuracy(fitted) > trained.accuracy(trained.model) - 1.5


def test_refining_helps_beyond_the_fit(trained: Trained) -> None:
    model = normswap.convert(copy.deepcopy(trained.model), "gn", num_groups=8)
    other = copy.deepcopy(model)
    report = normswap.calibrate(model, trained.seen.split(64))
    normswap.calibrate(other, trained.seen.split(64), refine_passes=0)
    assert report.kept == "refined"
    assert report.output_after < 0.9 * min(report.output_before, report.output_fitted)
    assert trained.error(model) < 0.9 * trained.error(other)
