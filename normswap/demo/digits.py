"""The data: scikit-learn's handwritten digits, as images for a convolutional network.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998: 1797 real
images of 8 × 8 pixels, which come with scikit-learn, so that nothing has to be downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Digits", "load_digits"]

SIDE = 32
BRIGHTEST = 16
TEST_SHARE = 500


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 32, 32) in [0, 1] and their labels, split once and for all.

    Args:
        train: what is trained on, and what warm-up and calibration read.
        test: what every accuracy is measured on.
    """

    train: TensorDataset
    test: TensorDataset

    def batches(self, size: int) -> DataLoader[tuple[Tensor, ...]]:
        """The training set in its own order, complete: what a statistics pass wants."""
        return DataLoader(self.train, batch_size=size)

    def shuffled(self, size: int, *, seed: int) -> DataLoader[tuple[Tensor, ...]]:
        """The training set in a new order every time, the incomplete last batch left out."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(
            self.train, batch_size=size, shuffle=True, drop_last=True, generator=order
        )


def load_digits(*, most_train: int | None = None, most_test: int | None = None) -> Digits:
    """Load the digits, every class in the same share of both parts.

    Args:
        most_train: keep only as many images to train on.
        most_test: keep only as many images to test on.

    Returns:
        The same split and the same order at every call.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    raw = load()
    small = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / BRIGHTEST
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(raw.target, dtype=torch.long)
    train, test = (
        torch.as_tensor(part)
        for part in train_test_split(
            range(len(labels)), test_size=TEST_SHARE, random_state=0, stratify=raw.target
        )
    )
    train, test = train[:most_train], test[:most_test]
    return Digits(
        TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])
    )
