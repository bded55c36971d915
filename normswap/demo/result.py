"""What the demo measured: every number, and the tables that show them."""

from __future__ import annotations

from dataclasses import dataclass, field

from normswap.table import render

__all__ = ["DemoResult", "Epoch", "Groups", "RoundTrip", "Sample"]


@dataclass(frozen=True)
class Epoch:
    """Test accuracies after an epoch of training, both in eval mode.

    Args:
        steps: optimizer steps up to here.
        running: with the running averages that training kept.
        warmed: with the statistics of `normswap.warmup`.
    """

    steps: int
    running: float
    warmed: float


@dataclass(frozen=True)
class Groups:
    """Test accuracies of the model as a GroupNorm network, without training and without labels.

    Errors are relative, of the logits, on training batches held out from the calibration: norm
    of the difference from the BatchNorm network's over norm of those.

    Args:
        asked: the number of groups, or ``None`` for normswap's choice.
        used: the numbers of groups that the layers got, without repetition, in order.
        copied: with weight and bias as they were, ``carry="copy"``.
        matched: with weight and bias matched to the running statistics, ``carry="auto"``, which
            takes no data.
        calibrated: with weight and bias fitted by `normswap.calibrate`, which takes data.
        matched_error: how far the matched network is from the BatchNorm network.
        calibrated_error: how far the calibrated one is.
        calibration_seconds: how long the calibration took.
    """

    asked: int | None
    used: tuple[int, ...]
    copied: float
    matched: float
    calibrated: float
    matched_error: float
    calibrated_error: float
    calibration_seconds: float = field(compare=False)

    @property
    def label(self) -> str:
        """How the setting is called in tables and pictures."""
        if self.asked is not None:
            return str(self.asked)
        return f"default ({self.used[0]} to {self.used[-1]})"


@dataclass(frozen=True)
class RoundTrip:
    """Test accuracies around `normswap.convert` and `normswap.revert`.

    Args:
        original: before.
        converted: in between, as the GroupNorm network of normswap's choice.
        reverted: afterwards.
        bit_equal: whether the logits of all test images were the same before any conversion of
            the demo and afterwards, to the last bit.
    """

    original: float
    converted: float
    reverted: float
    bit_equal: bool


@dataclass(frozen=True)
class Sample:
    """A test image, and what the trained model read in it.

    Args:
        pixels: brightness by row and column, 0 to 1.
        label: what it is.
        running: what was read with the running averages that training kept.
        warmed: what was read after the warm-up.
    """

    pixels: tuple[tuple[float, ...], ...]
    label: int
    running: int
    warmed: int


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured; prints as tables. Accuracies are shares, 0 to 1.

    Two results are equal when all is equal but the time.

    Args:
        architecture: timm's name of the network.
        norms: how many BatchNorms it has.
        momentum: their momentum.
        train_size: images trained on, warmed up with and calibrated on.
        test_size: images that each accuracy is measured on.
        batch_size: images in a step of training or calibration.
        epochs: one entry an epoch.
        groups: one entry a number of groups.
        round_trip: there and back again.
        samples: the first test images.
        warmup_seconds: how long the last warm-up took.
    """

    architecture: str
    norms: int
    momentum: float | None
    train_size: int
    test_size: int
    batch_size: int
    epochs: tuple[Epoch, ...]
    groups: tuple[Groups, ...]
    round_trip: RoundTrip
    samples: tuple[Sample, ...] = field(repr=False)
    warmup_seconds: float = field(compare=False)

    def __str__(self) -> str:
        return "\n\n".join((self._epochs_table(), self._groups_table(), self._round_trip_table()))

    def _epochs_table(self) -> str:
        return render(
            f"1. Warm-up: {self.norms} BatchNorms with momentum {self.momentum}, "
            f"batches of {self.batch_size}",
            ("epochs", "steps", "running averages as trained", "after normswap.warmup"),
            (
                (number, epoch.steps, percent(epoch.running), percent(epoch.warmed))
                for number, epoch in enumerate(self.epochs, start=1)
            ),
            footer=f"The warm-up read {self.train_size} images in {self.warmup_seconds:.1f} s. "
            "In a longer training, say --epochs 6, the running averages catch up.",
        )

    def _groups_table(self) -> str:
        return render(
            "2. BatchNorm to GroupNorm: without training, without labels",
            (
                "groups",
                'affine copied, carry="copy"',
                'moments matched, carry="auto"',
                "calibrated on data",
                "error of the logits, matched → calibrated",
            ),
            (
                (
                    row.label,
                    *map(percent, (row.copied, row.matched, row.calibrated)),
                    f"{row.matched_error:.2f} → {row.calibrated_error:.2f}",
                )
                for row in self.groups
            ),
            footer=f"As BatchNorm network: {percent(self.round_trip.original)}. Copying and "
            f"matching take no data; calibrate=loader read {self.train_size} images without their "
            f"labels in {max(row.calibration_seconds for row in self.groups):.1f} s at most.",
        )

    def _round_trip_table(self) -> str:
        trip = self.round_trip
        equal = "equal to the last bit" if trip.bit_equal else "NOT equal"
        return render(
            "3. There and back again",
            ("BatchNorm", 'convert(model, to="gn")', "revert(model)", "logits before and after"),
            [(percent(trip.original), percent(trip.converted), percent(trip.reverted), equal)],
            footer=f"All accuracies are of {self.architecture} on {self.test_size} test images.",
        )


def percent(share: float) -> str:
    """A share as text, with one decimal."""
    return f"{share:.1%}"
