"""Warm-ups that are killed at some point, and gone on with."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import normswap
from normswap.stats import bookmark
from normswap.stats.meetings import Meetings
from tests.reference.data import fill
from tests.reference.forks import Killed, in_fork, kill_oneself
from tests.stats.models import cut, images

#: Kinds of passes, by name.
PASSES: dict[str, dict[str, Any]] = {
    "pooled": {"method": "pooled"},
    "pooled to a tolerance": {"method": "pooled", "tol": 2.0},
    "average": {"method": "average"},
    "ema": {"method": "ema"},
    "population": {"method": "population"},
    "population in a file": {"method": "population", "memory": 0},
}


@dataclass
class Fuse:
    """Kills the process at a moment, counted from when it starts."""

    at: int | None = None
    burnt: int = 0

    def __call__(self) -> None:
        """One moment more."""
        self.burnt += 1
        if self.burnt == self.at:
            kill_oneself()


class Spark(nn.Module):
    """Burns a fuse by one at each forward."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        self.fuse()
        return x


def model_with(fuse: Fuse) -> nn.Sequential:
    """Three norms, of which one is called sample by sample, and moments to be killed at."""
    layers: list[nn.Module] = [Spark(fuse)]
    for norm in (nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)):
        layers += [nn.Conv2d(2 if len(layers) == 1 else 3, 3, 1), norm, nn.ReLU(), Spark(fuse)]
    layers += [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=None), Spark(fuse)]
    model = nn.Sequential(*layers)
    fill(model)
    return model


def batches(fuse: Fuse) -> Iterator[Tensor]:
    """Batches of different sizes, one of which is not finite."""
    for index, batch in enumerate(cut(images(44), [4, 5, 4, 3] * 2 + [4, 4, 4])):
        fuse()
        yield batch * float("nan") if index == 4 else batch
    fuse()


@contextmanager
def dense_saves(fuse: Fuse) -> Iterator[None]:
    """Every chance to save is taken, and half a file is a moment to be killed at."""
    before = safetensors.torch.save_file, os.replace, bookmark.SHARE

    def slow_save(tensors: Any, path: Path, metadata: Any) -> None:
        whole = safetensors.torch.save(tensors, metadata)
        with path.open("wb", buffering=0) as file:
            file.write(whole[:100])
            fuse()
            file.write(whole[100:])
        fuse()

    def slow_replace(source: Path, target: Path) -> None:
        before[1](source, target)
        fuse()

    safetensors.torch.save_file, os.replace = slow_save, slow_replace
    bookmark.SHARE = float("inf")
    try:
        yield
    finally:
        safetensors.torch.save_file, os.replace, bookmark.SHARE = before


@dataclass
class Outcome:
    """What a pass came to."""

    buffers: dict[str, list[int]]
    told: dict[str, Any]
    work: int
    burnt: int
    left: list[str] = field(default_factory=list)


def run(options: dict[str, Any], path: Path | None, at: int | None) -> Outcome:
    """One pass, killed at a moment if one is given."""
    fuse = Fuse(at)
    model = model_with(fuse)
    with dense_saves(fuse), _counted(Meetings, "settle") as settled:
        report = normswap.warmup(
            model, batches(fuse), resume=path, on_nonfinite="skip", progress=False, **options
        )
    told = report.to_dict()
    del told["seconds"], told["samples_per_second"]
    return Outcome(
        {name: _bits(buffer) for name, buffer in model.named_buffers()},
        told,
        # A population pass runs every forward again, and settles what was not final.
        work=len(settled) if options["method"] == "population" else model[0].calls[0],
        burnt=fuse.burnt,
        left=[] if path is None else os.listdir(path.parent),
    )


@dataclass
class Trial:
    """A pass that was killed at a moment, and gone on with to its end."""

    moment: int
    bookmarked: bool
    outcome: Outcome


@dataclass
class Trials:
    """Passes of one kind: without a bookmark, with one, and killed."""

    plain: Outcome
    whole: Outcome
    killed: list[Trial]


def trials(folder: Path, seed: int) -> dict[str, Trials]:
    """Kill passes of every kind at twenty random moments."""
    return {name: _trials(options, folder / name, seed) for name, options in PASSES.items()}


def _trials(options: dict[str, Any], folder: Path, seed: int) -> Trials:
    plain = run(options, None, None)
    whole = run(options, _place(folder, "whole"), None)
    moments = random.Random(seed).sample(range(1, whole.burnt + 1), 20)
    return Trials(plain, whole, [_trial(options, _place(folder, str(at)), at) for at in moments])


def _trial(options: dict[str, Any], path: Path, moment: int) -> Trial:
    try:
        in_fork(lambda: run(options, path, moment))
    except Killed:
        bookmarked = path.exists()
        return Trial(moment, bookmarked, run(options, path, None))
    raise AssertionError(f"nothing was killed at moment {moment}")


def _place(folder: Path, name: str) -> Path:
    """A file in a folder of its own."""
    (folder / name).mkdir(parents=True)
    return folder / name / "pass.safetensors"


def _bits(tensor: Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@contextmanager
def _counted(owner: Any, name: str) -> Iterator[list[None]]:
    """One entry a call of a function of a module or class."""
    calls: list[None] = []
    function = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(None)
        return function(*args)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, function)
