"""Running statistics that lag behind their weights, and what one pass over the data makes of them.

BatchNorm's running statistics are a moving average over the training's batches, so after a short
training with a low momentum they still remember weights that are long gone. Averaged weights, an
EMA over the steps or SWA (Izmailov et al. 2018, arXiv 1803.05407) over the last epochs, never saw a
batch at all: torch's `AveragedModel` holds the statistics of the net that it averages.
`normswap.warmup` estimates the statistics of the weights as they are.

The first table shows the accuracy on test digits before and after, for three momenta; the training
is the same in all rows, since a train-mode BatchNorm does not use what it keeps. The second shows
how well a pass estimates the first norm's mean and variance, against float64 over all images at
once. The last batch is short, and torch's `update_bn` weighs every batch alike and leaves out the
variance between batches, which is largest where the images are sorted. The accuracy beside the
errors tells whether this net feels them.

Run it with ``python examples/stale_statistics.py``; ``--quick`` takes one seed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

import torch
from digits_net import accuracy, begin, small_net, spread, train_epoch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normswap
from normswap.demo.digits import Digits, load_digits
from normswap.table import render

EPOCHS = 4
MOMENTA = (0.1, 0.03, 0.01)
WEIGHTS = ("as trained", "EMA", "SWA")
EMA_DECAY = 0.95
BATCH_SIZE = 256

Batches = Sequence[Tensor]


@dataclass(frozen=True)
class Estimate:
    """How well a way to estimate statistics did, on images in some order."""

    images: str
    name: str
    of_mean: float
    of_var: float
    accuracy: float


def train(
    digits: Digits, *, momentum: float, seed: int
) -> tuple[nn.Sequential, AveragedModel, AveragedModel]:
    """Train a net; return it with its EMA over the steps and its SWA over the last two epochs."""
    torch.manual_seed(seed)
    model = small_net(10, momentum=momentum)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    swa = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
    loader = digits.shuffled(64, seed=seed)
    for epoch in range(EPOCHS):
        train_epoch(model, loader, optimizer)
        if epoch >= EPOCHS - 2:
            swa.update_parameters(model)
    return model, ema, swa


def before_and_after(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Test accuracies with the statistics that the model keeps, and after a warm-up."""
    with normswap.preserve_stats(model):
        before = accuracy(model, digits.test)
        normswap.warmup(model, digits.batches(BATCH_SIZE), progress=False)
        return before, accuracy(model, digits.test)


def nothing(model: nn.Module, batches: Batches) -> None:
    """Leave the running averages of the training."""


def torch_update(model: nn.Module, batches: Batches) -> None:
    update_bn(batches, model)


def warm_up(model: nn.Module, batches: Batches) -> None:
    normswap.warmup(model, batches, progress=False)


ESTIMATES = {
    "averages of the training": nothing,
    "torch's update_bn": torch_update,
    "normswap.warmup": warm_up,
}


def errors(model: nn.Sequential, images: Tensor) -> tuple[float, float]:
    """The largest errors of the first norm's statistics: mean, in stds; variance, relative."""
    pool, convolution, norm = model[0], model[1], model[2]
    with torch.no_grad():
        values = copy.deepcopy(convolution).double()(pool(images.double()))
    true_mean, true_var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    of_mean = (norm.running_mean - true_mean).abs() / true_var.sqrt()
    return float(of_mean.max()), float((norm.running_var / true_var - 1).abs().max())


def estimates(model: nn.Sequential, digits: Digits) -> list[Estimate]:
    """Estimate the statistics every way, from batches of mixed and of sorted images."""
    images, _ = digits.train.tensors
    by_ink = images[images.mean((1, 2, 3)).argsort()]
    found = []
    for order, ordered in (("mixed", images), ("sorted by ink", by_ink)):
        for name, estimate in ESTIMATES.items():
            with normswap.preserve_stats(model):
                estimate(model, ordered.split(BATCH_SIZE))
                of_mean, of_var = errors(model, images)
                share = accuracy(model, digits.test)
            found.append(Estimate(order, name, of_mean, of_var, share))
    return found


def main() -> None:
    seeds = range(1 if begin(__doc__) else 3)
    digits = load_digits()
    trained = {
        (momentum, seed): train(digits, momentum=momentum, seed=seed)
        for momentum, seed in product(MOMENTA, seeds)
    }
    accuracies = {
        (momentum, weights): [
            before_and_after(trained[momentum, seed][index], digits) for seed in seeds
        ]
        for momentum, (index, weights) in product(MOMENTA, enumerate(WEIGHTS))
    }
    print(
        render(
            f"Accuracy on {len(digits.test)} test digits",
            ("momentum", "weights", "statistics of the training", "after normswap.warmup"),
            (
                (*case, *map(spread, zip(*measured, strict=True)))
                for case, measured in accuracies.items()
            ),
            footer=f"{EPOCHS} epochs in batches of 64, seeds: {len(seeds)}.",
        )
    )

    found = estimates(trained[MOMENTA[0], 0][0], digits)
    print()
    print(
        render(
            "Largest error in a channel of the first norm",
            ("images", "estimate", "mean, in stds", "variance, relative", "accuracy"),
            (
                (e.images, e.name, f"{e.of_mean:.0e}", f"{e.of_var:.0e}", f"{e.accuracy:.1%}")
                for e in found
            ),
            footer=f"{len(digits.train)} images in batches of {BATCH_SIZE} and a last one of "
            f"{len(digits.train) % BATCH_SIZE}, the first seed, momentum {MOMENTA[0]}.",
        )
    )

    low, high = MOMENTA[-1], MOMENTA[0]
    before, after = (mean(side) for side in zip(*accuracies[low, "as trained"], strict=True))
    gain = mean(b - a for a, b in accuracies[high, "as trained"])
    *_, torchs, ours = found
    print(
        f"\nWith momentum {low} one pass took the accuracy from {before:.1%} to {after:.1%}, with "
        f"momentum {high} it brought {100 * gain:+.1f} points; on sorted images the mean of "
        f"{torchs.name} was wrong by {torchs.of_mean:.0e} stds, that of {ours.name} by "
        f"{ours.of_mean:.0e}."
    )


if __name__ == "__main__":
    main()
