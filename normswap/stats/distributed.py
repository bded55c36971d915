"""Merging what the ranks have seen, so that all end with the same statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from normswap.norms.sync import ranks
from normswap.stats.accumulate import Accumulator

__all__ = ["merge_ranks"]


def merge_ranks(accumulators: list[Accumulator], group: Any) -> None:
    """Merge each accumulator with its peers on the other ranks, in the order of ranks.

    One collective for all. Every rank computes the same merge of the same numbers, so the results
    are equal to the bit, whatever each rank has seen, nothing included.

    Args:
        accumulators: as many, of the same sizes and kinds, on every rank.
        group: the process group; ``None`` for the default one.
    """
    world = ranks(group)
    if world == 1 or not accumulators:
        return
    device = _collective_device(group, accumulators[0].mean.device)
    packed = torch.cat(
        [
            torch.cat([a.weight.view(1), a.weight.new_tensor([a.calls]), a.mean, a.spread])
            for a in accumulators
        ]
    ).to(device)
    gathered = [torch.empty_like(packed) for _ in range(world)]
    dist.all_gather(gathered, packed, group=group)
    for accumulator in accumulators:
        accumulator.forget()
    for rank in gathered:
        numbers = rank.to(accumulators[0].mean.device)
        for accumulator in accumulators:
            size = len(accumulator.mean)
            weight, calls, mean, spread = torch.split(numbers[: 2 * size + 2], [1, 1, size, size])
            accumulator.merge(weight.squeeze(), mean, spread)
            accumulator.calls += int(calls)
            numbers = numbers[2 * size + 2 :]


def _collective_device(group: Any, device: torch.device) -> torch.device:
    """Where the group's backend wants its tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device
