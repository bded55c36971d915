"""How long finding and converting take, against torch's own converter in the same run.

Run it with ``python benchmarks/convert.py [model ...]``; the default is a ResNet-50. Rounds are
interleaved, each on a fresh copy of the model, and the medians are compared. A second run of
torch's converter is the control: its ratio says how noisy the machine is.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import timm
from torch import nn

import normswap
from normswap.table import render

ROUNDS = 15


def torch_converter(model: nn.Module) -> object:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


CONTENDERS: dict[str, Callable[[nn.Module], object]] = {
    "torch convert_sync_batchnorm": torch_converter,
    "torch again (control)": torch_converter,
    "normswap.find": normswap.find,
    "normswap.find and its graph": lambda model: normswap.find(model)[0].producer,
    'normswap.convert to "sync_bn"': lambda model: normswap.convert(model, to="sync_bn"),
    'normswap.convert to "frozen_bn"': lambda model: normswap.convert(model, to="frozen_bn"),
    'normswap.convert to "gn"': lambda model: normswap.convert(model, to="gn"),
    'normswap.convert to "bn" (nothing to do)': lambda model: normswap.convert(model, to="bn"),
    'normswap.convert to "gn" and revert': lambda model: normswap.revert(
        normswap.convert(model, to="gn")
    ),
}


def measure(name: str) -> str:
    model = timm.create_model(name)
    times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(ROUNDS + 1):
        for contender, run in CONTENDERS.items():
            subject = copy.deepcopy(model)
            started = time.perf_counter()
            run(subject)
            times[contender].append(time.perf_counter() - started)
    medians = {contender: statistics.median(seen[1:]) for contender, seen in times.items()}
    base = medians["torch convert_sync_batchnorm"]
    return render(
        f"{name}: {len(normswap.find(model))} normalizations, median of {ROUNDS} rounds",
        ("what", "ms", "x torch"),
        ((what, f"{1e3 * t:.2f}", f"{t / base:.2f}") for what, t in medians.items()),
    )


if __name__ == "__main__":
    warnings.simplefilter("error", normswap.NormSwapWarning)
    for model_name in sys.argv[1:] or ["resnet50"]:
        print(measure(model_name))
