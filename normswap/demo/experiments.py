"""The three experiments: warm up after a short training, convert without one, and revert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normswap
from normswap.demo.digits import Digits, load_digits
from normswap.demo.result import DemoResult, Epoch, Groups, RoundTrip, Sample
from normswap.demo.settings import Settings
from normswap.demo.training import ARCHITECTURE, Trainer, make_model, predict
from normswap.stats.report import WarmupReport

__all__ = ["run"]

#: Numbers of groups that are tried where they divide; ``None`` is normswap's choice.
GROUP_COUNTS = (1, None, 8, 32)
SAMPLES = 12


def run(settings: Settings) -> DemoResult:
    """Run all three on one model, leaving torch's default generator as it was.

    Args:
        settings: what to run. The same settings give the same numbers on the same machine.

    Returns:
        What was measured.
    """
    digits = load_digits(most_train=settings.most_train, most_test=settings.most_test)
    images, labels = digits.test.tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = make_model()
        norms = normswap.find(model)
        epochs = _train(model, digits, settings)
        running = predict(model, images)
        warmup = _warm_up(model, digits, settings)
        warmed = predict(model, images)
        groups = tuple(
            _as_group_norm(model, count, digits, settings)
            for count in GROUP_COUNTS
            if count is None or all(site.num_features % count == 0 for site in norms)
        )
        return DemoResult(
            architecture=ARCHITECTURE,
            norms=len(norms),
            momentum=norms[0].state.momentum,
            train_size=len(digits.train),
            test_size=len(digits.test),
            batch_size=settings.batch_size,
            epochs=epochs,
            groups=groups,
            round_trip=_there_and_back(model, images, labels, before=warmed),
            samples=_samples(images, labels, running, warmed),
            warmup_seconds=warmup.seconds,
        )


def _train(model: nn.Module, digits: Digits, settings: Settings) -> tuple[Epoch, ...]:
    """Train, and after every epoch see what a warm-up would bring, without keeping it."""
    images, labels = digits.test.tensors
    loader = digits.shuffled(settings.batch_size, seed=settings.seed)
    trainer = Trainer(model, loader, progress=settings.progress)
    steps = 0
    epochs = []
    for number in range(1, settings.epochs + 1):
        steps += trainer.epoch(f"Epoch {number} of {settings.epochs}")
        running = _accuracy(predict(model, images), labels)
        with normswap.preserve_stats(model):
            _warm_up(model, digits, settings)
            warmed = _accuracy(predict(model, images), labels)
        epochs.append(Epoch(steps, running, warmed))
    return tuple(epochs)


def _warm_up(model: nn.Module, digits: Digits, settings: Settings) -> WarmupReport:
    return normswap.warmup(
        model, digits.batches(2 * settings.batch_size), progress=settings.progress
    )


def _as_group_norm(
    model: nn.Module, count: int | None, digits: Digits, settings: Settings
) -> Groups:
    """Measure a GroupNorm network; the model is the BatchNorm network again afterwards."""
    images, labels = digits.test.tensors
    with normswap.converted(model, "gn", num_groups=count, carry="copy") as converted:
        copied = _accuracy(predict(converted, images), labels)
    with normswap.converted(model, "gn", num_groups=count, carry="auto") as converted:
        used = {m.num_groups for m in converted.modules() if isinstance(m, nn.GroupNorm)}
        matched = _accuracy(predict(converted, images), labels)
        report = normswap.calibrate(
            converted, digits.batches(settings.batch_size), progress=settings.progress
        )
        calibrated = _accuracy(predict(converted, images), labels)
    return Groups(
        asked=count,
        used=tuple(sorted(used)),
        copied=copied,
        matched=matched,
        calibrated=calibrated,
        matched_error=report.output_before,
        calibrated_error=report.output_after,
        calibration_seconds=report.seconds,
    )


def _there_and_back(
    model: nn.Module, images: Tensor, labels: Tensor, *, before: Tensor
) -> RoundTrip:
    """Convert and revert; ``before`` are the logits from before the first of all conversions."""
    converted = predict(normswap.convert(model, to="gn"), images)
    after = predict(normswap.revert(model), images)
    return RoundTrip(
        original=_accuracy(before, labels),
        converted=_accuracy(converted, labels),
        reverted=_accuracy(after, labels),
        bit_equal=torch.equal(before, after),
    )


def _samples(images: Tensor, labels: Tensor, running: Tensor, warmed: Tensor) -> tuple[Sample, ...]:
    """The first test images, not chosen ones."""
    return tuple(
        Sample(
            pixels=tuple(tuple(row) for row in images[index, 0].tolist()),
            label=int(labels[index]),
            running=int(running[index].argmax()),
            warmed=int(warmed[index].argmax()),
        )
        for index in range(min(SAMPLES, len(images)))
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)
