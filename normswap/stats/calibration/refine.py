"""All fitted affines together, once more: by what the whole model returns, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.stats.calibration.differences import error_and_size, output_error, outputs_of
from normswap.stats.calibration.pair import Example, Pair
from normswap.stats.distributed import first_of_all, total_of
from normswap.stats.feed import Feed, batch_size, batches_of
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
) -> float | None:
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
        The held-out error afterwards, at most what it was; ``None`` if what the model returns
        has no gradient, so that nothing could be moved.

    Raises:
        StatisticsError: the model cannot be run with gradients.
    """
    affines = _Affines(pairs)
    best, values = error, affines.values()
    steps = -(first_of_all((-len(examples), 0), group) or (0, 0))[0]
    told = batches_of(
        range(passes), batches=None, samples=None, progress=feed.progress, title="Refinement"
    )
    with affines.moving():
        try:
            for done in told:
                numbers = iter(examples)
                moved = False
                for step in range(steps):
                    index = next(numbers, None)
                    slopes, weight = affines.nowhere(), 0
                    if index is not None:
                        with shelf.working(examples[index].holder):
                            slopes, weight = _slopes(converted, affines, examples[index], feed)
                    moved |= affines.step(slopes, weight, (done + step / steps) / passes, group)
                if not moved:
                    return None
                error = output_error(converted, held_out, feed, shelf, group)
                if error < best:
                    best, values = error, affines.values()
        finally:
            affines.put(values)
    return best


class _Affines:
    """The affines that are refined.

    They are moved in single precision at least: what half precision rounds to is too coarse to
    be moved by small steps.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.tensors = [tensor for pair in pairs for tensor in pair.affine.values()]
        self._scales = [_scale(pair) for pair in pairs for _ in pair.affine]
        self._masters = [
            tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for tensor in self.tensors
        ]
        self._optimizer = torch.optim.Adam([{"params": [master]} for master in self._masters])

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Within the block they require gradients."""
        flags = [tensor.requires_grad for tensor in self.tensors]
        try:
            for tensor in self.tensors:
                tensor.requires_grad_(True)
            yield
        finally:
            for tensor, flag in zip(self.tensors, flags, strict=True):
                tensor.requires_grad_(flag)

    def values(self) -> list[Tensor]:
        """What they are."""
        return [tensor.detach().clone() for tensor in self.tensors]

    def put(self, values: list[Tensor]) -> None:
        """Let them be that."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)

    def nowhere(self) -> list[Tensor]:
        """No slope anywhere."""
        return [torch.zeros_like(tensor) for tensor in self.tensors]

    def step(self, slopes: list[Tensor], weight: int, way: float, group: Any) -> bool:
        """Go one step down the slopes of all ranks, each weighted by its samples.

        Args:
            slopes: this rank's.
            weight: its samples.
            way: how far the refinement has got, from 0 to 1.
            group: the process group.

        Returns:
            Whether there was anything to go by.
        """
        flat = torch.cat([slope.flatten().double() * weight for slope in slopes])
        total = total_of(torch.cat([flat, flat.new_tensor([weight])]), group)
        if not total[-1]:
            return False
        parts = torch.split(total[:-1] / total[-1], [tensor.numel() for tensor in self.tensors])
        rate = RATE * 0.5 * (1 + math.cos(math.pi * way))
        settings = zip(self._optimizer.param_groups, self._scales, strict=True)
        for setting, scale in settings:
            setting["lr"] = rate * scale
        for master, part in zip(self._masters, parts, strict=True):
            master.grad = part.view_as(master).to(master)
        self._optimizer.step()
        self.put(self._masters)
        return True


def _scale(pair: Pair) -> float:
    """The root mean square of a norm's gain: what a step is small against."""
    return float(pair.affine["weight"].detach().double().square().mean().sqrt()) or 1.0


def _slopes(
    converted: nn.Module, affines: _Affines, example: Example, feed: Feed
) -> tuple[list[Tensor], int]:
    """How the outputs' relative square differences rise with the affines, and by how many samples.

    Where nothing has a gradient, no sample tells.
    """
    try:
        with torch.enable_grad():
            result = example.fed_to(converted, feed)
            loss = sum(_losses(result, example.output), torch.zeros(()))
        if not loss.requires_grad:
            return affines.nowhere(), 0
        found = torch.autograd.grad(loss, affines.tensors, allow_unused=True)
    except RuntimeError as error:
        raise StatisticsError(
            f"the model cannot be run with gradients, as refining takes ({error}); "
            "give refine_passes=0 to leave that out"
        ) from error
    slopes = [
        none if slope is None else slope
        for none, slope in zip(affines.nowhere(), found, strict=True)
    ]
    return slopes, batch_size(example.batch)


def _losses(result: Any, wanted: Any) -> Iterator[Tensor]:
    for y, other in outputs_of(result, wanted):
        dtype = torch.promote_types(y.dtype, torch.float32)
        difference, size = error_and_size(y, other, dtype)
        yield (difference / size.clamp(min=TINY)).cpu()
