"""What norms that take an extra input cost, against torch's BatchNorm.

Run it with ``python benchmarks/inputs.py``. Forward and backward of one layer in training,
float32, contiguous, one thread, processor time. Rounds are interleaved; a time is the least of the
medians of several blocks of rounds. A second BatchNorm2d is the control. A spade is compared with
its convolutions and a BatchNorm2d, each run by itself.

On glibc set ``MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592`` before it:
otherwise large maps are given back and faulted in again, at the expense of whoever comes next,
which can double a time on the first shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import normswap
from normswap.table import render

SHAPES = ((32, 64, 56, 56), (16, 256, 28, 28), (64, 512, 7, 7))
SPADE_SHAPES = ((4, 64, 32, 32), (8, 32, 16, 16))
BLOCKS, ROUNDS = 5, 7
BATCH, CONTROL = "nn.BatchNorm2d", "again (control)"
LABELS, STYLE, CLASSES, HIDDEN = 8, 64, 10, 128

Run = Callable[[Tensor], Tensor]


def by_sample(shape: tuple[int, ...]) -> dict[str, Run]:
    """Layers whose affine is each sample's."""
    samples, channels = shape[:2]
    order = torch.Generator().manual_seed(1)
    domain = torch.randint(2, (samples,), generator=order)
    label = torch.randint(CLASSES, (samples,), generator=order)
    style = torch.randn(samples, STYLE, generator=order)
    build = partial(normswap.build, num_features=channels)
    classes, embedding = {"num_classes": CLASSES}, {"condition_dim": STYLE}
    return {
        BATCH: nn.BatchNorm2d(channels),
        CONTROL: nn.BatchNorm2d(channels),
        "dsbn, 2 domains": partial(build("dsbn"), domain=domain),
        "split_bn": partial(build("split_bn"), labelled=domain == 0),
        "cond_bn, classes": partial(build("cond_bn", **classes), label=label),
        "cond_bn, embedding": partial(build("cond_bn", **embedding), condition=style),
        "cond_in, classes": partial(build("cond_in", **classes), label=label),
        "adain, style vector": partial(build("adain", style_dim=STYLE), style=style),
    }


def by_position(shape: tuple[int, ...]) -> dict[str, Run]:
    """A spade, and its convolutions with a BatchNorm, without a norm's arithmetic."""
    samples, channels, *size = shape
    order = torch.Generator().manual_seed(1)
    segmap = torch.randint(LABELS, (samples, *size), generator=order)
    spade = normswap.build("spade", channels, num_labels=LABELS, hidden_dim=HIDDEN)
    one_hot = nn.functional.one_hot(segmap, LABELS).movedim(-1, 1).float()
    first = nn.Conv2d(LABELS, HIDDEN, 3, padding=1)
    second, third = (nn.Conv2d(HIDDEN, channels, 3, padding=1) for _ in range(2))
    batch = nn.BatchNorm2d(channels)

    def parts(x: Tensor) -> Tensor:
        hidden = first(one_hot).relu()
        return batch(x) + second(hidden) + third(hidden)

    return {"convolutions and BatchNorm2d": parts, "spade": partial(spade, segmap=segmap)}


def milliseconds(run: Run, x: Tensor, dy: Tensor) -> float:
    x.grad = None
    started = time.process_time()
    run(x).backward(dy)
    return 1e3 * (time.process_time() - started)


def measured(shape: tuple[int, ...], runs: dict[str, Run]) -> dict[str, float]:
    order = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=order).requires_grad_()
    dy = torch.randn(shape, generator=order)
    blocks: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(BLOCKS):
        times: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(ROUNDS):
            for what, run in runs.items():
                times[what].append(milliseconds(run, x, dy))
        for what, taken in times.items():
            blocks[what].append(statistics.median(taken))
    return {what: min(medians) for what, medians in blocks.items()}


def main() -> None:
    torch.set_num_threads(1)
    for shapes, make in ((SHAPES, by_sample), (SPADE_SHAPES, by_position)):
        for shape in shapes:
            times = measured(shape, make(shape))
            first = next(iter(times))
            rows = ((what, f"{ms:.2f}", f"{ms / times[first]:.2f}") for what, ms in times.items())
            title = f"{' × '.join(map(str, shape))}: forward and backward in training"
            print(render(title, ("what", "ms", f"× {first}"), rows), flush=True)


if __name__ == "__main__":
    main()
