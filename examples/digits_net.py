"""What the examples on digits share: a small net, an epoch of training, and accuracies as text.

It is no example itself. The data are `normswap.demo.digits`: scikit-learn's 1797 real images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

WIDTHS = (16, 32, 32, 32)


def small_net(
    outputs: int, *, strides: Sequence[int] = (1, 2, 2, 1), momentum: float = 0.1
) -> nn.Sequential:
    """Four convolutions with BatchNorm, for images (N, 1, 32, 32).

    Args:
        outputs: the size of what it returns, (N, outputs).
        strides: of the convolutions, the first of which sees the digits' own 8 × 8 pixels.
            Default: the last maps are 2 × 2.
        momentum: of the BatchNorms.
    """
    layers: list[nn.Module] = [nn.AvgPool2d(4)]
    for before, width, stride in zip((1, *WIDTHS), WIDTHS, strides, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width, momentum=momentum),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], outputs)
    )


def train_epoch(
    model: nn.Module, loader: Iterable[tuple[Tensor, ...]], optimizer: Optimizer
) -> None:
    """Train on every batch once, in train mode, which is left on."""
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of right answers, 0 to 1, in eval mode, which is left on."""
    inputs, labels = data.tensors
    model.eval()
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())


def spread(shares: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{100 * mean(shares):.1f} ± {100 * stdev(shares):.1f} %"


def begin(description: str | None) -> bool:
    """Keep torch to one thread, fastest for nets this small, and read the command line.

    Returns:
        Whether ``--quick`` was asked for: one seed, as tests do.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="take one seed")
    return bool(parser.parse_args().quick)
