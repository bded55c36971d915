"""The network: made, trained for an epoch, and asked what it reads on the test images."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ARCHITECTURE", "Trainer", "make_model", "predict"]

ARCHITECTURE = "resnet10t"
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05


def make_model() -> nn.Module:
    """A small timm ResNet for digits, with random weights from torch's default generator."""
    import timm

    # The usual stem of this network has a layer of 24 channels; in a "deep" one 32 divides the
    # channels of every layer, so that GroupNorm with 32 groups fits everywhere.
    model: nn.Module = timm.create_model(
        ARCHITECTURE, pretrained=False, in_chans=1, num_classes=10, stem_type="deep"
    )
    return model


class Trainer:
    """Trains a model epoch by epoch with AdamW and cross-entropy.

    Args:
        model: what is trained.
        loader: batches of images and labels, read once an epoch.
        progress: show a progress bar in a terminal.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[tuple[Tensor, ...]], *, progress: bool
    ) -> None:
        self._model = model
        self._loader = loader
        self._progress = progress
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def epoch(self, title: str) -> int:
        """Train on every batch once, in train mode, which is left on.

        Args:
            title: what the progress bar is called.

        Returns:
            The number of steps.
        """
        self._model.train()
        steps = 0
        for images, labels in _tracked(self._loader, title, show=self._progress):
            self._optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self._model(images), labels))
            self._optimizer.step()
            steps += 1
        return steps


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits (N, 10) on images, in eval mode, which is left on."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits


def _tracked(
    loader: Iterable[tuple[Tensor, ...]], title: str, *, show: bool
) -> Iterable[tuple[Tensor, ...]]:
    if not (show and sys.stderr.isatty()):
        return loader
    from rich.console import Console
    from rich.progress import track

    total = len(loader) if isinstance(loader, Sized) else None
    return track(loader, title, total=total, console=Console(stderr=True), transient=True)
