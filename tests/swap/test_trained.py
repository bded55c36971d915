"""Starts that keep the function, on a network trained on real data, in single precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from tests.extra import REQUIRING

NORMS = [
    entry.name
    for entry in normswap.list_norms()
    if "batch_norm" in entry.sources and entry.name not in REQUIRING
]

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


class Block(nn.Module):
    """A residual block with one ReLU for all its norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Block(32),
        nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.SiLU(), Block(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    images, labels = digits
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            for part in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[part]), labels[part]).backward()
                optimizer.step()
    net.eval()
    with torch.no_grad():
        right = net(images[1200:]).argmax(1) == labels[1200:]
    assert right.float().mean() > 0.8
    return net


@pytest.mark.parametrize("norm", NORMS)
def test_what_promises_the_same_evaluation_keeps_it(
    norm: str, trained: nn.Sequential, digits: tuple[Tensor, Tensor]
) -> None:
    images = digits[0][1200:1400]
    before = trained(images)
    plan: Any = normswap.plan(copy.deepcopy(trained), norm, example_inputs=images)
    promised = {step.fidelity for step in plan.of("convert", "already")}
    after = plan.apply().eval()(images)
    error = float(((after - before).norm() / before.norm()).detach())
    if promised <= {"exact", "eval"}:
        assert error <= 1e-6
    else:
        assert error > 1e-6  # or it could promise more
