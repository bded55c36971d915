"""Norm by norm: each affine fitted once all batches are there, by the fitted norms before it.

The converted model runs in lockstep, as for population statistics, and each of its forwards has
the original model's forward at its side. So each norm is aimed at what the original computed,
and fed by what the converted model really computes: errors do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.stats.accumulate import Batch, Pooled
from normswap.stats.calibration.companion import Companion, telling
from normswap.stats.calibration.joint import Fit, Joint
from normswap.stats.calibration.pair import Example, Pair
from normswap.stats.distributed import merge_ranks
from normswap.stats.feed import Feed, mapped
from normswap.stats.lockstep import Key, LateArrival, Lockstep
from normswap.stats.moments import channel_moments
from normswap.stats.shelf import Shelf

__all__ = ["fit_layerwise"]


def fit_layerwise(
    converted: nn.Module,
    original: nn.Module,
    pairs: list[Pair],
    feed: Feed,
    *,
    method: Fit,
    shelf: Shelf,
    group: Any,
) -> tuple[dict[int, Example], list[Pair]]:
    """Fit the affines of all pairs, in the order in which the converted model calls them.

    Args:
        converted: the converted model, in eval mode; its affines are written.
        original: the original model, in eval mode.
        pairs: what is fitted.
        feed: what is read, once.
        method: how each affine is fitted.
        shelf: where what waits is kept, and each batch's example under the batch's number.
        group: the process group, whose ranks fit together.

    Returns:
        By number the batches, with what the original model returns for them; and the pairs that
        were reached.
    """
    fits = _Layerwise(pairs, feed, method, group, Lockstep(shelf, group, {}))
    originals = {pair.path: pair.original for pair in pairs}
    with fits.standing(), telling(originals, Companion.arrive):
        try:
            for index, batch in enumerate(feed):
                box = [batch]
                del batch
                fits.lockstep.start(partial(fits.run, converted, original, box), index)
            fits.lockstep.run(fits.settle, enough=lambda: False)
        finally:
            fits.lockstep.give_up()
    return {index: fits.examples[index] for index in sorted(fits.examples)}, fits.reached


class _Layerwise:
    """One such pass. A pair meets twice: for running statistics, if needed, and for its fit."""

    def __init__(
        self, pairs: list[Pair], feed: Feed, method: Fit, group: Any, lockstep: Lockstep
    ) -> None:
        self.lockstep = lockstep
        self.examples: dict[int, Example] = {}
        self._pairs, self._feed, self._method, self._group = pairs, feed, method, group
        self._gains = [pair.affine["weight"].clone() for pair in pairs]
        self._fits = [Joint(pair.num_features, pair.affine["weight"].device) for pair in pairs]
        self._seen = [Pooled(pair.num_features, pair.affine["weight"].device) for pair in pairs]
        self._companions: dict[int, Companion] = {}

    @property
    def reached(self) -> list[Pair]:
        """The pairs that some batch of some rank has reached."""
        return [pair for pair, fit in zip(self._pairs, self._fits, strict=True) if fit.weight > 0]

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Stand at every pair's converted norm within the block."""
        handles: list[Any] = []
        try:
            for place, pair in enumerate(self._pairs):
                before = partial(self._before, place)
                handles.append(pair.norm.register_forward_pre_hook(before, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, converted: nn.Module, original: nn.Module, box: list[Any]) -> None:
        """Run one batch through both models; neither sees what the other does to its input."""
        batch, index = mapped(box.pop(), Tensor.clone), self.lockstep.index
        beside = Companion(partial(self._feed.run, original, mapped(batch, Tensor.clone)))
        self._companions[index] = beside
        try:
            self._feed.run(converted, mapped(batch, Tensor.clone))
            self.examples[index] = Example(batch, beside.finish())
        finally:
            beside.give_up()
            del self._companions[index]

    def settle(self, key: Key, brought: list[Any]) -> None:
        """Give a norm the statistics, or the affine, that all forwards of all ranks lead to."""
        place, fits = divmod(key[0], 2)
        pair = self._pairs[place]
        if not fits:
            seen = Pooled(pair.num_features, pair.affine["weight"].device)
            for batch in brought:
                seen.add(batch)
            merge_ranks([seen], self._group)
            total = self._seen[place]
            total.merge(seen.weight, seen.mean, seen.spread)
            total.calls += seen.calls
            mean, var = total.result()
            pair.norm.running_mean.copy_(mean)
            pair.norm.running_var.copy_(var)
            if pair.norm.num_batches_tracked is not None:
                pair.norm.num_batches_tracked.fill_(total.calls)
            return
        joint = Joint(pair.num_features, pair.affine["weight"].device)
        for each in brought:
            joint.merge(each.weight, each.mean, each.spread)
        merge_ranks([joint], self._group)
        self._fits[place].merge(joint.weight, joint.mean, joint.spread)
        self._apply(place)

    def _before(self, place: int, norm: nn.Module, args: Any, kwargs: Any) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        pair = self._pairs[place]
        try:
            if pair.needs_statistics:
                self.lockstep.meet(2 * place, partial(self._measure, pair, x))
            self.lockstep.meet(2 * place + 1, partial(self._compare, pair, x))
        except LateArrival:
            raise StatisticsError(
                f"{pair.path}: batch {self.lockstep.index} reaches it when its affine is fitted, "
                "since batches take different ways through the model; leave it out by where="
            ) from None
        self._apply(place)  # others have tried the bare norm since

    def _measure(self, pair: Pair, x: Tensor) -> Batch:
        values = x.numel() // pair.num_features
        if not values:
            nothing = torch.zeros(pair.num_features, dtype=torch.float64, device=x.device)
            return Batch(0, 0, nothing, nothing)
        return Batch(values, x.shape[0], *channel_moments(x, pair.channel_dim))

    def _compare(self, pair: Pair, x: Tensor) -> Joint:
        """What the original computes here, beside what the bare converted norm computes."""
        joint = Joint(pair.num_features, x.device)
        y = self._companions[self.lockstep.index].output_at(pair.path)
        joint.see(pair.bare(x), y, pair.channel_dim)
        if not bool((joint.mean.sum() + joint.spread.sum()).isfinite()):
            raise StatisticsError(
                f"{pair.path}: values that are not finite in batch {self.lockstep.index} (counted "
                "from 0); mend the data or the model"
            )
        return joint

    def _apply(self, place: int) -> None:
        pair = self._pairs[place]
        offset = "bias" in pair.affine
        pair.write(*self._fits[place].fit(self._method, self._gains[place], offset=offset))
