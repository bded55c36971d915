"""Fitting a converted model to the original on data: no labels, no training of anything else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from normswap.errors import OptionError, StatisticsError
from normswap.randomness import kept_random_state
from normswap.stats.calibration.candidates import Candidate, candidates
from normswap.stats.calibration.differences import Differences, differences, output_error
from normswap.stats.calibration.joint import Fit
from normswap.stats.calibration.layerwise import fit_layerwise
from normswap.stats.calibration.pair import Example, Pair, copies
from normswap.stats.calibration.refine import refine
from normswap.stats.calibration.report import CalibrationReport, Kept, SiteFit
from normswap.stats.calibration.undisturbed import require_undisturbed
from normswap.stats.distributed import failing_together, total_of
from normswap.stats.feed import Feed, Forward, batch_size, device_of, uncompiled, unwrapped
from normswap.stats.free_memory import half_of_free
from normswap.stats.keeping import kept_settings
from normswap.stats.shelf import Shelf
from normswap.stats.trial import rounding
from normswap.swap.changes import Changes
from normswap.swap.journal import remember_fit
from normswap.swap.select import Selector

__all__ = ["calibrate"]

#: Every so many batches one is held out.
HELD_OUT = 5


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: Fit = "least_squares",
    refine_passes: int = 5,
    where: Selector | None = None,
    batches: int | None = None,
    samples: int | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | bool | None = None,
    group: Any = None,
    memory: int | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Fit the affines of converted norms to what the original model computes.

    The loader is read once. All batches go through the converted model norm by norm, each beside
    the original model, and each norm's gain and offset are fitted per channel to what the
    original computes there, fed by the norms that are fitted already. Then all affines are
    refined together by what the model returns, with every fifth batch held out (of fewer the
    last). What is kept in the end is what proved best on those: the affines there were, the
    fitted or the refined ones. Running statistics that a new norm needs and its original had not
    are estimated on the way.

    Nothing but affines (and such statistics) changes, all or none; `normswap.revert` brings the
    originals back as before. With a process group every rank reads its own loader and all end
    with the same affines.

    Args:
        model: a model that `normswap.convert` converted. It is copied but for the parameters
            that stay, and the copy is run in eval mode.
        loader: any iterable of batches, as for `normswap.warmup`.
        method: ``"least_squares"``: the least mean square difference. ``"moments"``: equal mean
            and variance per channel.
        refine_passes: how often all batches are used to refine all affines together; 0 leaves
            that out.
        where: which converted norms, see `normswap.plan`. Default: those that are less faithful
            than in eval mode.
        batches: read at most as many batches.
        samples: stop after the batch that reaches as many samples.
        forward: ``forward(model, batch)`` for models that are called otherwise; what it returns
            is what the two models are compared by. The model that it is given is a copy.
        device: where batches are moved. Default: where the model's first parameter is.
        amp: run under autocast: a dtype, or true for the device's default.
        group: the process group. Default: the default one, if there is one.
        memory: bytes that waiting forwards may hold; the rest lies in a temporary file. Default:
            half of what is free.
        progress: show a progress bar in a terminal.

    Returns:
        The report: each norm's relative error before and after, and the whole model's, all on
        held-out batches.

    Raises:
        StatisticsError: nothing was converted or can be fitted, no data, data that is not
            finite, models that return nothing comparable, or forwards that disturb each other;
            nothing was written.
        OptionError: an argument has a value that it cannot take.

    Source: the least-squares fit is that of layer-wise reconstruction, as in Nagel et al., "Up or
    Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv 2004.10568, applied to a
    norm's gain and offset.
    """
    if method not in get_args(Fit):
        raise OptionError(f'method={method!r} is neither "least_squares" nor "moments"')
    if refine_passes < 0:
        raise OptionError(f"refine_passes={refine_passes}; give 0 or more")
    started = time.perf_counter()
    inner = unwrapped(model)
    chosen, left = candidates(inner, where)
    if not chosen:
        raise StatisticsError(
            "no converted normalization can be fitted: "
            + "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:4])
        )
    place = device_of(inner, device)
    feed = Feed(loader, batches, samples, forward, place, amp, progress, "Calibration")
    with failing_together(group):
        converted, original, pairs = copies(inner, chosen)
        shelf = Shelf(half_of_free(place) if memory is None else memory, converted, original)
        with torch.no_grad(), kept_random_state(), kept_settings(), uncompiled():
            try:
                run = _Calibration(converted, original, pairs, feed, shelf, group)
                run.fit(method, refine_passes)
            finally:
                shelf.clear()
        _write(chosen, run)
    rows = [
        SiteFit(pair.path, "calibrated", run.before.sites[pair.path], run.after.sites[pair.path])
        for pair in run.reached
    ]
    left |= {pair.path: "no batch reached it" for pair in pairs if pair not in run.reached}
    return CalibrationReport(
        [*rows, *(SiteFit(path, reason) for path, reason in left.items())],
        method=method,
        kept=run.kept,
        output_before=run.before.output,
        output_fitted=run.fitted,
        output_after=run.after.output,
        batches=len(run.examples),
        held_out=len(run.held_out) if len(run.held_out) < sum(map(bool, run.sizes)) else 0,
        samples=sum(run.sizes),
        note=run.note,
        seconds=time.perf_counter() - started,
    )


class _Calibration:
    """One calibration, on copies."""

    before: Differences
    after: Differences

    def __init__(
        self,
        converted: nn.Module,
        original: nn.Module,
        pairs: list[Pair],
        feed: Feed,
        shelf: Shelf,
        group: Any,
    ) -> None:
        self._converted, self._original, self._pairs = converted, original, pairs
        self._feed, self._shelf, self._group = feed, shelf, group
        self.reached: list[Pair] = []
        self.examples: dict[int, Example] = {}
        self.held_out: dict[int, Example] = {}
        self.sizes: list[int] = []
        self.kept: Kept = "as before"
        self.fitted = 0.0
        self.note = ""

    def fit(self, method: Fit, passes: int) -> None:
        """Fit norm by norm, refine, and keep what is best on held-out batches."""
        start = self._values()
        self.examples, self.reached = fit_layerwise(
            self._converted,
            self._original,
            self._pairs,
            self._feed,
            method=method,
            shelf=self._shelf,
            group=self._group,
        )
        self.sizes = [batch_size(example.batch) for example in self.examples.values()]
        if not total_of(torch.tensor([sum(self.sizes)]), self._group).item():
            raise StatisticsError("the loader yielded no sample, so nothing was fitted")
        if not self.reached:
            raise StatisticsError(
                "no batch reached a norm that was to be fitted; does forward= run the model that "
                "it is given?"
            )
        dtypes = {pair.affine["weight"].dtype for pair in self._pairs}
        apart = rounding(dtypes, amp=bool(self._feed.amp))
        require_undisturbed(
            self._original, self.examples, apart, self._feed, self._shelf, self._group
        )
        self.held_out = self._apart()
        fitted = self._values()
        self._put(start)
        self.before = self._differences()
        best, self.kept = start, "as before"
        self._put(fitted)
        error = self.fitted = self._error()
        if error < self.before.output:
            best, self.kept = fitted, "fitted"
        self._put(best)
        if passes:
            self._refine(passes, min(error, self.before.output))
        self.after = self._differences()

    def _refine(self, passes: int, error: float) -> None:
        rest = {i: each for i, each in self.examples.items() if i not in self.held_out}
        numbers = [len(rest), sum(batch_size(each.batch) for each in rest.values())]
        left, samples = total_of(torch.tensor(numbers), self._group).tolist()
        if not left:
            self.note = "not refined: that takes a second batch, to judge it by"
            return
        if not samples:
            self.note = "not refined: the batches that are left for it are empty"
            return
        refined = refine(
            self._converted,
            self.reached,
            rest,
            self.held_out,
            self._feed,
            passes=passes,
            error=error,
            shelf=self._shelf,
            group=self._group,
        )
        if refined is None:
            self.note = "not refined: what the model returns has no gradient"
        elif refined < error:
            self.kept = "refined"

    def _apart(self) -> dict[int, Example]:
        """What is held out: of few batches the last, and a single one judges itself.

        Those that are empty judge nothing.
        """
        numbers = [n for n, each in self.examples.items() if batch_size(each.batch)]
        apart = numbers[HELD_OUT - 1 :: HELD_OUT] or numbers[-1:]
        return {number: self.examples[number] for number in apart}

    def _differences(self) -> Differences:
        return differences(
            self._converted,
            self._original,
            self._pairs,
            self.held_out,
            self._feed,
            self._shelf,
            self._group,
        )

    def _error(self) -> float:
        return output_error(self._converted, self.held_out, self._feed, self._shelf, self._group)

    def _values(self) -> list[list[Tensor]]:
        return [[t.detach().clone() for t in pair.fitted.values()] for pair in self._pairs]

    def _put(self, values: list[list[Tensor]]) -> None:
        for pair, tensors in zip(self._pairs, values, strict=True):
            for tensor, value in zip(pair.fitted.values(), tensors, strict=True):
                tensor.copy_(value)


def _write(chosen: list[Candidate], run: _Calibration) -> None:
    """Write what was found into the model, all or none."""
    changes = Changes()
    norms = {each.path: each.site.module for each in chosen}
    for pair in run.reached:
        before, after = run.before.sites[pair.path], run.after.sites[pair.path]
        note = f"relative error {before:.3f} before calibration, {after:.3f} after"
        remember_fit(norms[pair.path], pair.fitted, note, changes)
    changes.make(nn.Module())
