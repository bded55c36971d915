"""All fitted affines together, once more: by what the whole model returns, without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.stats.calibration.differences import output_error, outputs_of
from normswap.stats.calibration.pair import Example, Pair
from normswap.stats.distributed import first_of_all, total_of
from normswap.stats.feed import Feed, batch_size, mapped
from normswap.stats.shelf import Shelf

__all__ = ["refine"]

#: The first step size, in units of a norm's root mean square gain.
RATE = 2e-2
#: Keeps outputs that are all zero from dividing by zero.
TINY = 1e-12


def refine(
    converted: nn.Module,
    pairs: list[Pair],
    examples: Mapping[int, Example],
    held_out: Mapping[int, Example],
    feed: Feed,
    *,
    passes: int,
    error: float,
    shelf: Shelf,
    group: Any,
) -> float:
    """Move the affines towards what the original model returns, and keep them where that helps.

    Adam on the mean square difference of the outputs, with a step size that falls as a cosine.
    After each pass the error on held-out examples is looked at, and the best affines are kept,
    which may be those that there were before.

    Args:
        converted: the converted model, in eval mode.
        pairs: whose affines are moved.
        examples: what they are moved by, by number.
        held_out: what they are judged by, by number.
        feed: how the model is run.
        passes: how often all examples are used.
        error: the held-out error before.
        shelf: where the examples are.
        group: the process group, whose ranks refine together.

    Returns:
        The held-out error afterwards, at most what it was.
    """
    affines = [tensor for pair in pairs for tensor in pair.affine.values()]
    scales = [_scale(pair) for pair in pairs for _ in pair.affine]
    best = error, [tensor.detach().clone() for tensor in affines]
    steps = -(first_of_all((-len(examples), 0), group) or (0, 0))[0]
    optimizer = torch.optim.Adam([{"params": [tensor]} for tensor in affines])
    flags = [tensor.requires_grad for tensor in affines]
    try:
        for tensor in affines:
            tensor.requires_grad_(True)
        for done in range(passes):
            numbers = iter(examples)
            for step in range(steps):
                way = (done + step / steps) / passes
                for part, scale in zip(optimizer.param_groups, scales, strict=True):
                    part["lr"] = RATE * scale * 0.5 * (1 + math.cos(math.pi * way))
                index = next(numbers, None)
                slopes = [torch.zeros_like(tensor) for tensor in affines]
                weight = 0
                if index is not None:
                    with shelf.working(index):
                        slopes = _slopes(converted, affines, examples[index], feed)
                        weight = batch_size(examples[index].batch)
                _step(optimizer, affines, slopes, weight, group)
            error = output_error(converted, held_out, feed, shelf, group)
            if error < best[0]:
                best = error, [tensor.detach().clone() for tensor in affines]
    finally:
        for tensor, flag, value in zip(affines, flags, best[1], strict=True):
            tensor.grad = None
            tensor.requires_grad_(flag)
            with torch.no_grad():
                tensor.copy_(value)
    return best[0]


def _scale(pair: Pair) -> float:
    """The root mean square of a norm's gain: what a step is small against."""
    return float(pair.affine["weight"].detach().square().mean().sqrt()) or 1.0


def _slopes(
    converted: nn.Module, affines: list[Tensor], example: Example, feed: Feed
) -> list[Tensor]:
    """How the outputs' relative square differences fall with the affines."""
    with torch.enable_grad():
        result = feed.run(converted, mapped(example.batch, Tensor.clone))
        losses = [
            (y - wanted).square().mean() / wanted.square().mean().clamp(min=TINY)
            for y, wanted in outputs_of(result, example.output)
        ]
        loss = torch.stack(losses).sum()
    found = torch.autograd.grad(loss, affines, allow_unused=True)
    return [
        torch.zeros_like(tensor) if slope is None else slope
        for tensor, slope in zip(affines, found, strict=True)
    ]


def _step(
    optimizer: torch.optim.Optimizer,
    affines: list[Tensor],
    slopes: list[Tensor],
    weight: int,
    group: Any,
) -> None:
    """One step along the slopes of all ranks, each weighted by its samples."""
    flat = torch.cat([*(slope.flatten().double() * weight for slope in slopes)])
    total = total_of(torch.cat([flat, flat.new_tensor([weight])]), group)
    parts = torch.split(total[:-1] / total[-1], [tensor.numel() for tensor in affines])
    for tensor, part in zip(affines, parts, strict=True):
        tensor.grad = part.view_as(tensor).to(tensor)
    optimizer.step()
