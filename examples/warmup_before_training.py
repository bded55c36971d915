"""Statistics of the data set before training: what a first pass over the data is good for.

Two towers that share their weights see a digit each, and a head says whether it is the same digit.
Such a net may be trained with its statistics held fixed, so that a pair's answer does not depend
on the other pairs of its batch, in training as later in use. But held at what? A new BatchNorm's
statistics are mean 0 and variance 1, so that it normalizes nothing. `normswap.warmup` estimates
them with one pass over the training pairs, before the first step; converting to ``"frozen_bn"``
then holds them, and the norms' weight and bias too.

Three ways to train are measured with and without that pass, on pairs of test digits: normally,
where every batch brings its own statistics; with fixed statistics; and the latter at three times
the learning rate. In normal training the pass changes no weight, which is checked to the bit: it
only touches an evaluation that comes before the running averages have caught up.

Run it with ``python examples/warmup_before_training.py``; ``--quick`` takes one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from digits_net import accuracy, begin, small_net, spread, train_epoch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import normswap
from normswap.demo.digits import Digits, load_digits
from normswap.table import render

EMBEDDING = 32
TRAIN_PAIRS, TEST_PAIRS = 2048, 1000
EPOCHS = 4
TEST_SEED = 1000


class TwoTowers(nn.Module):
    """Tells from a pair (N, 2, 1, 32, 32) whether it is the same digit; returns logits (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = small_net(EMBEDDING)
        self.head = nn.Linear(EMBEDDING, 2)

    def forward(self, pairs: Tensor) -> Tensor:
        left, right = pairs.unbind(1)
        logits: Tensor = self.head((self.tower(left) - self.tower(right)).abs())
        return logits


@dataclass(frozen=True)
class Way:
    """How a net is trained: with its batches' statistics or fixed ones, and at what rate."""

    name: str
    fixed: bool
    learning_rate: float


#: A trained net, and its test accuracy after each epoch.
Run = tuple[TwoTowers, list[float]]

WAYS = (
    Way("each batch's own", fixed=False, learning_rate=1e-3),
    Way("fixed", fixed=True, learning_rate=1e-3),
    Way("fixed", fixed=True, learning_rate=3e-3),
)


def pairs_of(digits: TensorDataset, count: int, *, seed: int) -> TensorDataset:
    """Random pairs, half of them of the same digit; the label says which."""
    images, labels = digits.tensors
    draws = torch.Generator().manual_seed(seed)
    left = torch.randint(len(images), (count,), generator=draws)
    same = torch.randint(2, (count,), generator=draws)
    fits = (labels[left, None] == labels) == same[:, None].bool()
    right = torch.multinomial(fits.double(), 1, generator=draws)[:, 0]
    return TensorDataset(torch.stack([images[left], images[right]], dim=1), same)


def train(way: Way, pairs: Digits, *, warm: bool, seed: int) -> Run:
    """Train from the seed's own start."""
    torch.manual_seed(seed)
    model = TwoTowers()
    if warm:
        normswap.warmup(model, pairs.batches(256), progress=False)
    if way.fixed:
        normswap.convert(model, to="frozen_bn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=way.learning_rate)
    loader = pairs.shuffled(64, seed=seed)
    accuracies = []
    for _ in range(EPOCHS):
        train_epoch(model, loader, optimizer)
        accuracies.append(accuracy(model, pairs.test))
    return model, accuracies


def last_accuracy(runs: Sequence[Run]) -> float:
    return mean(accuracies[-1] for _, accuracies in runs)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def main() -> None:
    seeds = range(1 if begin(__doc__) else 5)
    digits = load_digits()
    test = pairs_of(digits.test, TEST_PAIRS, seed=TEST_SEED)
    data = [Digits(pairs_of(digits.train, TRAIN_PAIRS, seed=seed), test) for seed in seeds]

    rows, gains, equal = [], [], True
    for way in WAYS:
        cold, warm = (
            [train(way, data[seed], warm=warm, seed=seed) for seed in seeds]
            for warm in (False, True)
        )
        for start, runs in (("mean 0, variance 1", cold), ("after warmup", warm)):
            by_epoch = zip(*(accuracies for _, accuracies in runs), strict=True)
            rows.append((way.name, f"{way.learning_rate:g}", start, *map(spread, by_epoch)))
        gains.append(100 * (last_accuracy(warm) - last_accuracy(cold)))
        if not way.fixed:
            equal = all(
                same_weights(one, other) for (one, _), (other, _) in zip(cold, warm, strict=True)
            )

    columns = ["statistics in training", "learning rate", "at the start"]
    print(
        render(
            f"Same digit or not: accuracy on {TEST_PAIRS} test pairs",
            columns + [f"epoch {number}" for number in range(1, EPOCHS + 1)],
            rows,
            footer=f"{TRAIN_PAIRS} training pairs in batches of 64, seeds: {len(seeds)}. In normal "
            "training the weights with and without warmup are "
            f"{'equal to the last bit' if equal else 'NOT equal'}.",
        )
    )
    normal, fixed, faster = gains
    print(
        f"\nAfter {EPOCHS} epochs a warm-up before training was worth {fixed:+.1f} points where "
        f"statistics are held fixed, {faster:+.1f} at the higher learning rate, and "
        f"{normal:+.1f} in normal training."
    )


if __name__ == "__main__":
    main()
