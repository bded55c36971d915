"""What a statistics pass costs beyond the forwards, against the passes of fvcore and torch.

Run it with ``python benchmarks/warmup.py``; ``pip install fvcore`` before, to have its pass
compared too. Rounds are interleaved, and the medians of the rounds' ratios are given. Times are
those of one thread on the processor, so that what else runs on the machine hardly matters; a
second bare loop is the control. Then: time against the size of the data, and memory against what
``memory=`` allows.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normswap
from normswap.table import render

ROUNDS = 5
MIB = 2**20

Batches = Sequence[Tensor]
Run = Callable[[nn.Module, Any], object]


def small_net() -> nn.Module:
    widths = (3, 32, 64, 128, 128)
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


#: What makes the model, images a batch, their size, and batches.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "timm resnet50": (lambda: timm.create_model("resnet50"), 16, 64, 32),
    "four convolutions": (small_net, 64, 32, 100),
}


class Images:
    """Random images, made as they are asked for, the same at every reading."""

    def __init__(self, batch: int, size: int, batches: int) -> None:
        self.shape, self.batches = (batch, 3, size, size), batches

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            yield torch.randn(self.shape, generator=generator)


def bare(*, training: bool) -> Run:
    @torch.no_grad()
    def run(model: nn.Module, batches: Batches) -> None:
        model.train(training)
        for batch in batches:
            model(batch)

    return run


def warmup(**options: Any) -> Run:
    return partial(warmed, options)


def warmed(options: dict[str, Any], model: nn.Module, batches: Batches) -> None:
    normswap.warmup(model.train(), batches, **options)


def fvcore(model: nn.Module, batches: Batches) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model.train(), batches, len(batches))


TRAIN, EVAL = "bare loop, train mode", "bare loop, eval mode"
POPULATION = warmup(method="population")
CONTENDERS: dict[str, Run] = {
    TRAIN: bare(training=True),
    "again (control)": bare(training=True),
    EVAL: bare(training=False),
    "torch update_bn": lambda model, batches: update_bn(batches, model.train()),
    "fvcore update_bn_stats": fvcore,
    'warmup, "pooled"': warmup(),
    'warmup, "pooled", tol=1e-9': warmup(tol=1e-9),
    'warmup, "average"': warmup(method="average"),
    'warmup, "population"': POPULATION,
    'warmup, "population", memory=0': warmup(method="population", memory=0),
}
if find_spec("fvcore") is None:
    del CONTENDERS["fvcore update_bn_stats"]


def seconds(run: Run, model: nn.Module, batches: Batches) -> float:
    gc.collect()
    started = time.process_time()
    run(model, batches)
    return time.process_time() - started


def speed(name: str) -> str:
    make, batch, size, batches = MODELS[name]
    model, data = make(), list(Images(batch, size, batches))
    rounds = [
        {what: seconds(run, model, data) for what, run in CONTENDERS.items()}
        for _ in range(ROUNDS + 1)
    ][1:]

    def ratio(what: str, peer: str) -> str:
        return f"{statistics.median(each[what] / each[peer] for each in rounds):.2f}"

    return render(
        f"{name}: {batches} batches of {batch} images, {size} × {size}; median of {ROUNDS} rounds",
        ("what", "ms a batch", "× train", "× eval"),
        (
            (
                what,
                f"{1e3 * statistics.median(each[what] for each in rounds) / batches:.2f}",
                ratio(what, TRAIN),
                ratio(what, EVAL),
            )
            for what in CONTENDERS
        ),
    )


def growth(name: str) -> str:
    make, batch, size, batches = MODELS[name]
    model, data = make(), list(Images(batch, size, 4 * batches))
    times: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(ROUNDS):
        for factor, taken in times.items():
            part = data[: factor * batches]
            taken.append(1e3 * seconds(POPULATION, model, part) / (batch * len(part)))
    return render(
        f'{name}: "population" on more and more data; median of {ROUNDS} rounds',
        ("images", "ms an image"),
        (
            (f"{factor * batch * batches}", f"{statistics.median(taken):.2f}")
            for factor, taken in times.items()
        ),
    )


def peak(run: Run, name: str) -> float:
    """The most memory that a run takes beyond what there was, in MiB, in a process of its own."""
    mine, its = Pipe()
    process = multiprocessing.get_context("spawn").Process(target=report, args=(run, name, its))
    process.start()
    its.close()
    try:
        return float(mine.recv())
    finally:
        process.join()


def report(run: Run, name: str, pipe: Connection) -> None:
    make, batch, size, batches = MODELS[name]
    model = make()
    run(model, Images(batch, size, 1))
    before = resident()
    with HighWater() as water:
        run(model, Images(batch, size, 4 * batches))
    pipe.send((water.level - before) / MIB)


def resident() -> int:
    """The bytes of memory that this process holds now: its peak so far would hide what comes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class HighWater:
    """The most that :func:`resident` says within the block, looked at every two milliseconds."""

    def __enter__(self) -> HighWater:
        self.level, self._over = resident(), threading.Event()
        self._looking = threading.Thread(target=self._look)
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.level = max(self.level, resident())


def memory(name: str) -> str:
    _, batch, size, batches = MODELS[name]
    allowed = {f"{mib} MiB": mib * MIB for mib in (0, 16, 64, 1024)}
    return render(
        f'{name}: memory that "population" takes on {4 * batches} batches of {batch} images, '
        f"{size} × {size}, beyond a pass over one batch",
        ("memory=", "peak, MiB"),
        (
            (what, f"{peak(warmup(method='population', memory=bound), name):.0f}")
            for what, bound in allowed.items()
        ),
    )


def main() -> None:
    torch.set_num_threads(1)
    for name in MODELS:
        for table in (speed, growth, memory):
            print(table(name), flush=True)


if __name__ == "__main__":
    main()
