"""How far the converted model is from the original: at its norms, and in what it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.stats.calibration.companion import Companion, telling
from normswap.stats.calibration.pair import Example, Pair
from normswap.stats.distributed import total_of
from normswap.stats.feed import Feed
from normswap.stats.shelf import Shelf

__all__ = ["Differences", "differences", "error_and_size", "output_error", "outputs_of"]


@dataclass(frozen=True)
class Differences:
    """Relative errors: the norm of the difference over the norm of what the original computes.

    Args:
        sites: at each norm's output, by path.
        output: in what the model returns.
    """

    sites: Mapping[str, float]
    output: float


def differences(
    converted: nn.Module,
    original: nn.Module,
    pairs: list[Pair],
    examples: Mapping[int, Example],
    feed: Feed,
    shelf: Shelf,
    group: Any,
) -> Differences:
    """Compare both models on examples, norm by norm and in the end."""
    sums = {pair.path: torch.zeros(2, dtype=torch.float64) for pair in pairs}
    beside: Companion | None = None

    def compare(path: str, y: Tensor) -> None:
        if beside is not None:
            sums[path] += _sums(y, by_path[path].aim(beside.output_at(path)))

    by_path = {pair.path: pair for pair in pairs}
    originals = {pair.path: pair.original for pair in pairs}
    norms = {pair.path: pair.norm for pair in pairs}
    with telling(originals, Companion.arrive), telling(norms, compare):
        for example in examples.values():
            with shelf.working(example.holder):
                beside = Companion(partial(example.fed_to, original, feed))
                try:
                    example.fed_to(converted, feed)
                finally:
                    beside.give_up()
    together = total_of(torch.stack(list(sums.values())), group)
    sites = {path: _relative(row) for path, row in zip(sums, together, strict=True)}
    return Differences(sites, output_error(converted, examples, feed, shelf, group))


def output_error(
    converted: nn.Module, examples: Mapping[int, Example], feed: Feed, shelf: Shelf, group: Any
) -> float:
    """The relative error of what a model returns, over all examples of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for example in examples.values():
        with shelf.working(example.holder):
            result = example.fed_to(converted, feed)
            for y, wanted in outputs_of(result, example.output):
                sums += _sums(y, wanted)
    return _relative(total_of(sums, group))


def outputs_of(result: Any, wanted: Any) -> list[tuple[Tensor, Tensor]]:
    """What both models return, tensor beside tensor, floating-point ones only.

    Raises:
        StatisticsError: they do not return the same kind of thing, or nothing to compare.
    """
    ours, theirs = list(_floats(result)), list(_floats(wanted))
    if not theirs:
        raise StatisticsError(
            f"the model returns no floating-point tensor ({type(wanted).__name__}), so there is "
            "nothing to compare; give a forward= that returns tensors, in tuples, lists or dicts"
        )
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        raise StatisticsError(
            "the converted model does not return what the original returns: "
            f"{[tuple(y.shape) for y in ours]} instead of {[tuple(y.shape) for y in theirs]}; "
            "give a forward= that returns comparable tensors"
        )
    return list(zip(ours, theirs, strict=True))


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _floats(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _floats(part)


def error_and_size(y: Tensor, wanted: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared norms of the difference and of what is wanted, where that is finite.

    Args:
        y: what the converted model computes.
        wanted: what the original computes; a mask of minus infinity, say, is nothing to fit.
        dtype: what to compute in.
    """
    finite = wanted.isfinite()
    wanted = wanted.to(dtype).where(finite, 0)
    return (y.to(dtype).where(finite, 0) - wanted).square().sum(), wanted.square().sum()


def _sums(y: Tensor, wanted: Tensor) -> Tensor:
    return torch.stack(error_and_size(y.detach(), wanted, torch.float64)).cpu()


def _relative(sums: Tensor) -> float:
    difference, wanted = sums.tolist()
    if math.isnan(difference):  # what is not finite is as far off as can be
        return math.inf
    return float((difference / wanted) ** 0.5) if wanted else float(difference > 0)
