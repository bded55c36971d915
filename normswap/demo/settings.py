"""How large the demo is. Imports nothing heavy, so that the command line can tell the defaults."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How much is trained, on what, from which seed.

    Args:
        seed: of the initial weights and of the order of the batches.
        epochs: how often the training set is read.
        batch_size: images in a step of training or calibration.
        most_train: train on only as many images.
        most_test: test on only as many images.
        progress: show progress bars in a terminal.
    """

    seed: int = 0
    epochs: int = 3
    batch_size: int = 64
    most_train: int | None = None
    most_test: int | None = None
    progress: bool = True


#: A short training, as in a trial run: too short for running averages with torch's momentum.
FULL = Settings()
#: For a look that takes seconds, and for tests.
QUICK = Settings(epochs=2, batch_size=32, most_train=256, most_test=200)
