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
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normswap
from normswap.table import render

ROUNDS = 7
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
    "timm resnet50": (lambda: timm.create_model("resnet50"), 16, 64, 8),
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
    return lambda model, batches: normswap.warmup(model.train(), batches, **options)


def fvcore(model: nn.Module, batches: Batches) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model.train(), batches, len(batches))


TRAIN, EVAL = "bare loop, train mode", "bare loop, eval mode"
CONTENDERS: dict[str, Run] = {
    TRAIN: bare(training=True),
    "again (control)": bare(training=True),
    EVAL: bare(training=False),
    "torch update_bn": lambda model, batches: update_bn(batches, model.train()),
    "fvcore update_bn_stats": fvcore,
    'warmup, "pooled"': warmup(),
    'warmup, "pooled", tol=1e-9': warmup(tol=1e-9),
    'warmup, "average"': warmup(method="average"),
    'warmup, "population"': warmup(method="population"),
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
    model, run = make(), CONTENDERS['warmup, "population"']
    rows = []
    for factor in (1, 2, 4):
        data = list(Images(batch, size, factor * batches))
        taken = statistics.median(seconds(run, model, data) for _ in range(3))
        rows.append((factor * batch * batches, f"{1e3 * taken / (factor * batch * batches):.2f}"))
    return render(f'{name}: "population" on more and more data', ("images", "ms an image"), rows)


def peak(run: Run, name: str) -> float:
    """The most memory that a run takes beyond what there was, in MiB, in a process of its own."""
    make, batch, size, batches = MODELS[name]

    def report(pipe: Connection) -> None:
        model, data = make(), Images(batch, size, 4 * batches)
        bare(training=False)(model, Images(batch, size, 1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(model, data)
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    mine, its = Pipe()
    process = multiprocessing.get_context("fork").Process(target=report, args=(its,))
    process.start()
    process.join()
    return float(mine.recv())


def memory(name: str) -> str: ...
