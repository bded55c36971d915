"""BatchNorm to GroupNorm for batches under 8: a trained net learns new classes two at a time.

A net with BatchNorm learns the digits 0 to 4 in batches of 64. Then it is to learn 5 to 9, with a
new last layer, in batches of 8, 4 and 2. Four nets do so from the same start: as it is; as it is,
and warmed up afterwards; as a frozen BatchNorm, which needs no batch; and as a GroupNorm (Wu and He
2018, arXiv 1803.08494), which `normswap.convert` starts from the weights and statistics that
BatchNorm had learnt.

What matters is not the batch but how many values a norm pools: a batch of 2 has 2 values a channel
where maps are 1 × 1, and 8 where they are 2 × 2. So a net whose last maps are larger is measured
too.

Run it with ``python examples/small_batch_groupnorm.py``; ``--quick`` takes one seed.
"""

from __future__ import annotations

import copy
from statistics import mean

import torch
from digits_net import WIDTHS, accuracy, begin, small_net, spread, train_epoch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

import normswap
from normswap.demo.digits import Digits, load_digits
from normswap.table import render

CLASSES = 5
STRIDES = {"1 × 1": (1, 2, 2, 2), "2 × 2": (1, 2, 2, 1)}
BATCH_SIZES = {"1 × 1": (2, 4, 8), "2 × 2": (2,)}
EPOCHS = 2
TARGETS = {"frozen BatchNorm": "frozen_bn", "GroupNorm": "gn"}
NETS = ("BatchNorm", "BatchNorm, then warmup", *TARGETS)


def classes_from(first: int, digits: Digits) -> Digits:
    """Five of the ten classes, counted from 0."""

    def part(data: TensorDataset) -> TensorDataset:
        images, labels = data.tensors
        chosen = (labels >= first) & (labels < first + CLASSES)
        return TensorDataset(images[chosen], labels[chosen] - first)

    return Digits(part(digits.train), part(digits.test))


def trained(digits: Digits, strides: tuple[int, ...], *, seed: int) -> nn.Sequential:
    """A net with BatchNorm, trained in batches of 64, its statistics exact."""
    torch.manual_seed(seed)
    model = small_net(CLASSES, strides=strides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = digits.shuffled(64, seed=seed)
    for _ in range(8):
        train_epoch(model, loader, optimizer)
    normswap.warmup(model, digits.batches(256), progress=False)
    return model


def fine_tune(model: nn.Module, digits: Digits, *, batch_size: int, seed: int) -> float:
    """Train all of the model at a falling rate, and return its test accuracy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = digits.shuffled(batch_size, seed=seed)
    falling = LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS * len(loader))
    optimizer.register_step_post_hook(lambda *_: falling.step())
    for _ in range(EPOCHS):
        train_epoch(model, loader, optimizer)
    return accuracy(model, digits.test)


def compared(start: nn.Module, digits: Digits, *, batch_size: int, seed: int) -> dict[str, float]:
    """Fine-tune from one start every way."""
    model = copy.deepcopy(start)
    plain = fine_tune(model, digits, batch_size=batch_size, seed=seed)
    normswap.warmup(model, digits.batches(256), progress=False)
    found = {"BatchNorm": plain, "BatchNorm, then warmup": accuracy(model, digits.test)}
    for name, target in TARGETS.items():
        model = normswap.convert(start, to=target, inplace=False)
        found[name] = fine_tune(model, digits, batch_size=batch_size, seed=seed)
    return found


def main() -> None:
    seeds = range(1 if begin(__doc__) else 3)
    digits = load_digits()
    old, new = classes_from(0, digits), classes_from(CLASSES, digits)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for maps, strides in STRIDES.items():
        for seed in seeds:
            start = trained(old, strides, seed=seed)
            start[-1] = nn.Linear(WIDTHS[-1], CLASSES)
            for batch_size in BATCH_SIZES[maps]:
                run = compared(start, new, batch_size=batch_size, seed=seed)
                found.setdefault((maps, batch_size), []).append(run)

    print(
        render(
            f"Accuracy on {len(new.test)} test digits of the new classes",
            ("last maps", "batch", *NETS),
            (
                (*case, *(spread([run[name] for run in runs]) for name in NETS))
                for case, runs in found.items()
            ),
            footer=f"{EPOCHS} epochs on {len(new.train)} digits, seeds: {len(seeds)}.",
        )
    )
    gains = {
        case: 100 * mean(run["GroupNorm"] - run["BatchNorm"] for run in runs)
        for case, runs in found.items()
    }
    print(
        f"\nGroupNorm against BatchNorm, in points: {gains['1 × 1', 2]:+.1f} in batches of 2 where "
        f"the last maps are 1 × 1, {gains['2 × 2', 2]:+.1f} where they are 2 × 2, and "
        f"{gains['1 × 1', 8]:+.1f} in batches of 8 with 1 × 1."
    )


if __name__ == "__main__":
    main()
