"""What one norm costs, against torch's BatchNorm and against its own formula in plain torch.

Run it with ``python benchmarks/norms.py``, for some norms with their names behind it, for two
threads with ``--threads 2``, on a GPU with ``--device cuda``. Forward and backward of one layer in
training, float32, contiguous, of normal numbers; ``--mean`` is how many deviations they are from
zero, as on the processor a norm by a rule measures again what is more than two. Rounds are
interleaved; a time is the least of the medians of several blocks of rounds, in processor time with
one thread, in real time with more, and by the device's own events on a GPU, from the first launch
to the end. A second BatchNorm2d is the control.

On a GPU there is also what the bytes take: forward reads a map twice and writes one, backward reads
both twice and writes one, which is four copies. A map that fits its cache is copied faster than
from memory.

The formulas are those of `textbook`, which a test compares with the layers. "Kept" is the memory
that waits for backward, beside the layer's own tensors, in sizes of the input.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from textbook import FORMULAS, Textbook
from torch import Tensor, nn

import normswap
from normswap.table import render

SHAPES = ((32, 64, 56, 56), (16, 256, 28, 28), (64, 512, 7, 7))
BLOCKS, ROUNDS = 5, 5
#: What is asked for where the default depends on the channels, or is no part of these batches.
OPTIONS = {"gn": {"num_groups": 32}, "ghost_bn": {"group_size": 8}}

#: Bytes that forward and backward have to move, in copies of the input.
COPIES = 4

#: Milliseconds that something takes.
Stopwatch = Callable[[Callable[[], object]], float]


def known() -> list[str]:
    """The norms that are layers of their own and have a formula."""
    return [e.name for e in normswap.list_norms() if e.stands_alone and e.name in FORMULAS]


def contenders(names: Sequence[str], channels: int) -> dict[tuple[str, str], nn.Module]:
    """Layers and formulas, each with parameters and buffers of its own."""
    made: dict[tuple[str, str], nn.Module] = {
        ("nn.BatchNorm2d", kind): nn.BatchNorm2d(channels) for kind in ("layer", "control")
    }
    for name in names:
        layer = normswap.build(name, channels, **OPTIONS.get(name, {}))
        made[name, "layer"] = layer
        made[name, "textbook"] = Textbook(FORMULAS[name], copy.deepcopy(layer))
    return made


def by(clock: Callable[[], float]) -> Stopwatch:
    def measure(run: Callable[[], object]) -> float:
        started = clock()
        run()
        return 1e3 * (clock() - started)

    return measure


def by_events(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def milliseconds(norm: nn.Module, x: Tensor, dy: Tensor, stopwatch: Stopwatch) -> float:
    x.grad = None
    norm.zero_grad()
    return stopwatch(lambda: norm(x).backward(dy))


def copying(x: Tensor) -> float:
    """The milliseconds of the bytes that a norm has to move, at the bandwidth of a copy."""
    source, target = x.detach(), torch.empty_like(x)
    times = [by_events(lambda: target.copy_(source)) for _ in range(BLOCKS * ROUNDS)]
    return COPIES * statistics.median(times)


def kept(norm: nn.Module, x: Tensor) -> float:
    """What a forward keeps for backward beside the norm's own tensors, in sizes of the input."""
    own = {t.untyped_storage().data_ptr() for t in (*norm.parameters(), *norm.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x)  # held, so that nothing that was kept is given to something else
        total = sum(seen.values())
    del y
    return total / x.untyped_storage().nbytes()


def rows(
    names: Sequence[str], shape: tuple[int, ...], mean: float, device: str, stopwatch: Stopwatch
) -> Iterator[Sequence[str]]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + mean).to(device).requires_grad_()
    dy = torch.randn(shape, generator=generator).to(device)
    norms = {what: norm.to(device) for what, norm in contenders(names, shape[1]).items()}
    if device == "cuda":
        for norm in norms.values():
            norm(x).backward(dy)  # compiles what it runs
    least = dict.fromkeys(norms, float("inf"))
    for _ in range(BLOCKS):
        times: dict[tuple[str, str], list[float]] = {what: [] for what in norms}
        for _ in range(ROUNDS):
            for what, norm in norms.items():
                times[what].append(milliseconds(norm, x, dy, stopwatch))
        least = {what: min(least[what], statistics.median(times[what])) for what in norms}
    base = least["nn.BatchNorm2d", "layer"]
    control = least["nn.BatchNorm2d", "control"]
    x_kept = {what: f"{kept(norm, x):.2f}" for what, norm in norms.items()}
    yield ("nn.BatchNorm2d", f"{base:.3f}", "1.00", "", x_kept["nn.BatchNorm2d", "layer"], "")
    yield ("again (control)", f"{control:.3f}", f"{control / base:.2f}", "", "", "")
    if device == "cuda":
        moved = copying(x)
        yield ("its bytes, as copies", f"{moved:.3f}", f"{moved / base:.2f}", "", "", "")
    for name in names:
        ours, theirs = least[name, "layer"], least[name, "textbook"]
        yield (
            name,
            f"{ours:.3f}",
            f"{ours / base:.2f}",
            f"{theirs / ours:.1f}",
            x_kept[name, "layer"],
            x_kept[name, "textbook"],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What one norm costs in training.")
    parser.add_argument("names", nargs="*", metavar="name", help="norms; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mean", type=float, default=0.0, help="deviations of the input from zero")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    names = [normswap.spec(name).name for name in asked.names] or known()
    torch.set_num_threads(asked.threads)
    if asked.device == "cuda":
        where, stopwatch = torch.cuda.get_device_name(), by_events
    else:
        where = f"{asked.threads} thread{'s' * (asked.threads > 1)}"
        stopwatch = by(time.process_time if asked.threads == 1 else time.perf_counter)
    for shape in SHAPES:
        table = render(
            f"{' × '.join(map(str, shape))}, {where}: forward and backward in training",
            (
                "norm",
                "ms",
                "× BatchNorm2d",
                "× faster than its textbook",
                "kept, × input",
                "kept by the textbook",
            ),
            rows(names, shape, asked.mean, asked.device, stopwatch),
        )
        print(table, flush=True)


if __name__ == "__main__":
    main()
