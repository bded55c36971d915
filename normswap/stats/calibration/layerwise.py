"""Norm by norm: each affine fitted once all batches are there, by the fitted norms before it.

The converted model runs in lockstep, as for population statistics, and each of its forwards has
the original model's forward at its side. So each norm is aimed at what the original computed,
and fed by what the converted model really computes: errors do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
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
from normswap.stats.lockstep import Key, Lockstep, meet
from normswap.stats.moments import channel_moments
from normswap.stats.probe import input_of
from normswap.stats.shelf import Holder, Shelf

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
        shelf: where what waits is kept, the examples too.
        group: the process group, whose ranks fit together.

    Returns:
        By number the batches, with what the original model returns for them; and the pairs that
        were reached.
    """
    labels = [pair.path for pair in pairs for _ in range(2)]
    lockstep = Lockstep(shelf, group, labels, "leave it out by where=", {}, staying=True)
    fits = _Layerwise(pairs, feed, method, group)
    originals = {pair.path: pair.original for pair in pairs}
    with fits.standing(), telling(originals, Companion.arrive), lockstep:
        with closing(iter(feed)) as batches:
            for index, batch in enumerate(batches):
                holder = shelf.holder()
                run = partial(fits.run, converted, original, [batch], index, holder)
                lockstep.start(run, index, holder=holder)
        while lockstep.settle(fits.settle):
            lockstep.go_on()
    return {index: fits.examples[index] for index in sorted(fits.examples)}, fits.reached


class _Layerwise:
    """One such pass. A pair meets twice: for running statistics, if needed, and for its fit."""

    def __init__(self, pairs: list[Pair], feed: Feed, method: Fit, group: Any) -> None:
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

    def run(
        self,
        converted: nn.Module,
        original: nn.Module,
        box: list[Any],
        index: int,
        holder: Holder,
    ) -> None:
        """Run one batch through both models; neither sees what the other does to its input."""
        batch = mapped(box.pop(), Tensor.clone)
        run = partial(self._feed.run, original, mapped(batch, Tensor.clone))
        beside = Companion(holder.making(run))
        self._companions[index] = beside
        try:
            self._feed.run(converted, mapped(batch, Tensor.clone))
            self.examples[index] = Example(batch, beside.finish(), holder)
        finally:
            beside.give_up()
            del self._companions[index]

    def settle(self, key: Key, brought: list[Any]) -> None:
        """Give a norm the statistics, or the affine, that all forwards of all ranks lead to."""
        place, fits = divmod(key[0], 2)
        pair = self._pairs[place]
        if not fits:
            seen = Pooled(pair.num_features, pair.affine["weight"].device)
            seen.add_all([batch for batch in brought if batch.count])
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
        x = input_of(args, kwargs)
        pair = self._pairs[place]
        if pair.needs_statistics:
            meet(2 * place, partial(self._measure, pair, x))
        meet(2 * place + 1, partial(self._compare, pair, x))
        self._apply(place)  # others have tried the bare norm since

    def _measure(self, pair: Pair, x: Tensor, index: int) -> Batch:
        values = x.numel() // pair.num_features
        if not values:
            nothing = torch.zeros(pair.num_features, dtype=torch.float64, device=x.device)
            return Batch(0, 0, nothing, nothing)
        return Batch(values, x.shape[0], *channel_moments(x, pair.channel_dim))

    def _compare(self, pair: Pair, x: Tensor, index: int) -> Joint:
        """What the original computes here, beside what the bare converted norm computes."""
        joint = Joint(pair.num_features, x.device)
        y = pair.aim(self._companions[index].output_at(pair.path))
        joint.see(pair.bare(x), y, pair.channel_dim)
        if not bool((joint.mean.sum() + joint.spread.sum()).isfinite()):
            raise StatisticsError(
                f"{pair.path}: values that are not finite in batch {index} (counted from 0); "
                "mend the data or the model"
            )
        return joint

    def _apply(self, place: int) -> None:
        pair = self._pairs[place]
        offset = "bias" in pair.affine
        pair.write(*self._fits[place].fit(self._method, self._gains[place], offset=offset))
