"""Ranks that pass over data together: one fails, all fail; and all end with the same statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normswap.errors import StatisticsError
from normswap.norms.sync import ranks
from normswap.stats.accumulate import Mergeable

__all__ = [
    "all_well",
    "anywhere",
    "failing_together",
    "first_of_all",
    "merge_ranks",
    "rank_of",
    "total_of",
]

_WELL, _FAILED = 0, 1
_NOTHING = (torch.iinfo(torch.int64).max,) * 2


class _AnotherFailed(StatisticsError):
    """Another rank has failed, and has told so."""


@contextmanager
def failing_together(group: Any) -> Iterator[None]:
    """Tell the other ranks if the block fails: they are told at their next agreement.

    What cannot tell any more, such as a process that was killed, the group's time-out is for.
    """
    try:
        yield
    except _AnotherFailed:
        raise
    except Exception:
        if ranks(group) > 1:
            _gather(torch.tensor([_FAILED, *_NOTHING]), group)
        raise


def first_of_all(key: tuple[int, int] | None, group: Any) -> tuple[int, int] | None:
    """The least of what the ranks propose, on every rank the same; ``None`` if none does.

    Raises:
        StatisticsError: a rank has failed.
    """
    if ranks(group) == 1:
        return key
    proposals = [row.tolist() for row in _gather(torch.tensor([_WELL, *(key or _NOTHING)]), group)]
    failed = [rank for rank, (status, *_) in enumerate(proposals) if status == _FAILED]
    if failed:
        raise _AnotherFailed(
            f"rank {failed[0]} failed, as its own error says; nothing was written on any rank"
        )
    place, call = min((place, call) for _, place, call in proposals)
    return None if (place, call) == _NOTHING else (place, call)


def all_well(group: Any) -> None:
    """Wait for the other ranks, and raise if one has failed.

    Raises:
        StatisticsError: a rank has failed.
    """
    first_of_all(None, group)


def anywhere(something: bool, group: Any) -> bool:
    """Whether something is so on any rank.

    Raises:
        StatisticsError: a rank has failed.
    """
    return first_of_all((0, 0) if something else None, group) is not None


def total_of(tensor: Tensor, group: Any) -> Tensor:
    """The sum of the same-shaped tensors of all ranks, added in their order.

    Raises:
        StatisticsError: a rank has failed.
    """
    if ranks(group) == 1:
        return tensor
    all_well(group)
    return torch.stack(_gather(tensor, group)).sum(0).to(tensor.device)


def rank_of(group: Any) -> int | None:
    """This process's number among several; ``None`` if it is alone."""
    return dist.get_rank(group) if ranks(group) > 1 else None


def merge_ranks(accumulators: Sequence[Mergeable], group: Any) -> None:
    """Merge each accumulator with its peers on the other ranks, in the order of ranks.

    One collective for all. Every rank computes the same merge of the same numbers, so the results
    are equal to the bit, whatever each rank has seen, nothing included.

    Args:
        accumulators: as many, of the same sizes and kinds, on every rank.
        group: the process group; ``None`` for the default one.
    """
    if ranks(group) == 1 or not accumulators:
        return
    device = accumulators[0].mean.device
    packed = torch.cat(
        [
            torch.cat([a.weight.view(1), a.weight.new_tensor([a.calls]), a.mean, a.spread])
            for a in accumulators
        ]
    )
    gathered = _gather(packed, group)
    for accumulator in accumulators:
        accumulator.forget()
    for rank in gathered:
        numbers = rank.to(device)
        for accumulator in accumulators:
            sizes = [1, 1, len(accumulator.mean), len(accumulator.spread)]
            weight, calls, mean, spread = torch.split(numbers[: sum(sizes)], sizes)
            accumulator.merge(weight.squeeze(), mean, spread)
            accumulator.calls += int(calls)
            numbers = numbers[sum(sizes) :]


def _gather(tensor: Tensor, group: Any) -> list[Tensor]:
    """The same-sized tensors of all ranks, in their order."""
    sent = tensor.to(_collective_device(group, tensor.device))
    gathered = [torch.empty_like(sent) for _ in range(ranks(group))]
    dist.all_gather(gathered, sent, group=group)
    return gathered


def _collective_device(group: Any, device: torch.device) -> torch.device:
    """Where the group's backend wants its tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device
