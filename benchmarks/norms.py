"""What norms by per-channel statistics cost, against torch's BatchNorm and the textbook's formulas.

Run it with ``python benchmarks/norms.py``, for two threads with ``python benchmarks/norms.py 2``.
Forward and backward of one layer in training, float32, contiguous. Rounds are interleaved; a time
is the least of the medians of several blocks of rounds, in processor time with one thread and in
real time with more. A second BatchNorm2d is the control.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import normswap
from normswap.table import render

SHAPES = ((32, 64, 56, 56), (16, 256, 28, 28), (64, 512, 7, 7))
BLOCKS, ROUNDS = 5, 7


class Textbook(nn.Module):
    """Switchable normalization as one writes it down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mean_weight, self.var_weight = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), keepdim=True)
        square = var + mean**2
        layer_mean = mean.mean(1, keepdim=True)
        layer_var = square.mean(1, keepdim=True) - layer_mean**2
        batch_mean = mean.mean(0, keepdim=True)
        batch_var = square.mean(0, keepdim=True) - batch_mean**2
        with torch.no_grad():
            self.running_mean.lerp_(batch_mean, 0.1)
            self.running_var.lerp_(batch_var, 0.1)
        p, q = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = p[0] * mean + p[1] * layer_mean + p[2] * batch_mean
        var = q[0] * var + q[1] * layer_var + q[2] * batch_var
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


BY_RULE = ("sn", "cn", "ebn", "bin", "ibn", "adaptive_bn", "iebn", "in", "ln")
BATCH, CONTROL, TEXTBOOK = "nn.BatchNorm2d", "again (control)", "sn, textbook"
CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    BATCH: nn.BatchNorm2d,
    CONTROL: nn.BatchNorm2d,
    "nn.GroupNorm(32)": lambda channels: nn.GroupNorm(32, channels),
    "ghost_bn(group_size=8)": lambda channels: normswap.build("ghost_bn", channels, group_size=8),
    **{name: partial(normswap.build, name) for name in BY_RULE},
    TEXTBOOK: Textbook,
}


def milliseconds(norm: nn.Module, x: Tensor, dy: Tensor, clock: Callable[[], float]) -> float:
    x.grad = None
    norm.zero_grad()
    started = clock()
    norm(x).backward(dy)
    return 1e3 * (clock() - started)


def measured(shape: tuple[int, ...], clock: Callable[[], float]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    dy = torch.randn(shape, generator=generator)
    norms = {what: make(shape[1]) for what, make in CONTENDERS.items()}
    blocks: dict[str, list[float]] = {what: [] for what in norms}
    for _ in range(BLOCKS):
        times: dict[str, list[float]] = {what: [] for what in norms}
        for _ in range(ROUNDS):
            for what, norm in norms.items():
                times[what].append(milliseconds(norm, x, dy, clock))
        for what, taken in times.items():
            blocks[what].append(statistics.median(taken))
    return {what: min(medians) for what, medians in blocks.items()}


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    for shape in SHAPES:
        times = measured(shape, clock)
        table = render(
            f"{' × '.join(map(str, shape))}, {threads} thread{'s' * (threads > 1)}: "
            "forward and backward in training",
            ("what", "ms", "× BatchNorm2d", "× faster than the textbook"),
            (
                (what, f"{ms:.2f}", f"{ms / times[BATCH]:.2f}", f"{times[TEXTBOOK] / ms:.1f}")
                for what, ms in times.items()
            ),
        )
        print(table, flush=True)


if __name__ == "__main__":
    main()
