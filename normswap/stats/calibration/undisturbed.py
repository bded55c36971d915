"""Whether a forward that waited for others computed what it computes alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import nn

from normswap.errors import StatisticsError
from normswap.stats.calibration.differences import output_error
from normswap.stats.calibration.pair import Example
from normswap.stats.feed import Feed
from normswap.stats.shelf import Shelf

__all__ = ["require_undisturbed"]


def require_undisturbed(
    original: nn.Module,
    examples: Mapping[int, Example],
    rounding: float,
    feed: Feed,
    shelf: Shelf,
    group: Any,
) -> None:
    """Raise if what a forward kept on the model while it waited was another's when it went on.

    Every rank runs its first batch alone. A model that draws random numbers, or goes on from what
    its last call has left, cannot be judged.

    Args:
        original: the original model.
        examples: the batches, and what it returned for them when they waited for each other.
        rounding: what two equal runs may differ by.
        feed: what runs it.
        shelf: where the examples are kept.
        group: the process group.

    Raises:
        StatisticsError: forwards disturb each other.
    """
    first = dict(islice(examples.items(), 1))
    if output_error(original, first, feed, shelf, group) <= rounding:
        return
    alone = {number: _run(original, example, feed, shelf) for number, example in first.items()}
    # So that a model that goes on from its last call, whatever that was, shows it.
    for example in islice(examples.values(), 1, 2):
        _run(original, example, feed, shelf)
    if output_error(original, alone, feed, shelf, group) <= rounding:
        raise StatisticsError(
            "forwards of this model disturb each other: what one keeps on the model while it "
            "waits at a norm, the next overwrites, so it cannot be calibrated batch beside batch; "
            "give all data as a single batch (a loader of one larger batch, or batches=1)"
        )


def _run(original: nn.Module, example: Example, feed: Feed, shelf: Shelf) -> Example:
    """The same batch, with what the original returns for it now."""
    with shelf.working(example.holder):
        return Example(example.batch, example.fed_to(original, feed), example.holder)
