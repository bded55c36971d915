"""Estimating the running statistics of a model's norms on data, before or after training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.errors import OptionError, StatisticsError
from normswap.graph.site import NormSite
from normswap.randomness import kept_random_state
from normswap.stats.accumulate import Accumulator, Average, Batch, Ema, Pooled, precise
from normswap.stats.choice import choose
from normswap.stats.distributed import merge_ranks
from normswap.stats.feed import Forward, batch_size, batches_of, call, moved, unwrapped
from normswap.stats.keeping import kept_modes
from normswap.stats.measure import UNTOUCHED, measuring
from normswap.stats.report import Drift, WarmupReport, drift
from normswap.swap.changes import Changes
from normswap.swap.select import Selector

__all__ = ["Method", "warmup"]

Method = Literal["ema", "average", "pooled"]


def warmup(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: Method = "pooled",
    batches: int | None = None,
    samples: int | None = None,
    forward: Forward | None = None,
    where: Selector | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | bool | None = None,
    group: Any = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> WarmupReport:
    """Estimate the running statistics of a model's normalizations in one pass over data.

    Only the norms run in train mode; everything else, dropout and stochastic depth included, is
    in eval mode. The statistics are written in place, at the end, all or none, as torch keeps
    them: the mean, the unbiased variance, and the number of batches seen. Modes, momentum, hooks
    and random states are as before afterwards. With a process group every rank reads its own
    loader and all end with the same statistics.

    Args:
        model: any module with BatchNorm layers or others that keep running statistics.
        loader: any iterable of batches. A batch that is a tensor is passed as it is; of a tuple
            or list the first item; a mapping as those keywords that the forward accepts.
        method: ``"pooled"``: exact mean and total variance over all values, each norm fed by
            norms that use their batch statistics. ``"average"``: the mean of the batches'
            statistics. ``"ema"``: the moving average that training keeps.
        batches: read at most as many batches.
        samples: stop after the batch that reaches as many samples.
        forward: ``forward(model, batch)`` for models that are called otherwise.
        where: which norms, see `normswap.plan`. Default: those in train mode, or all if none is;
            what is held frozen is left alone and reported.
        device: where batches are moved. Default: where the model's first parameter is.
        amp: run under autocast: a dtype, or true for the device's default.
        group: the process group to merge over. Default: the default one, if there is one.
        on_nonfinite: what to do about a batch with values that are not finite: ``"raise"``, or
            ``"skip"`` and count it in the report.
        progress: show a progress bar in a terminal.

    Returns:
        The report: how far each norm's statistics moved, and which were left alone and why.

    Raises:
        StatisticsError: there is nothing to estimate, no data, or data that is not finite; the
            error names the norm and the batch, and nothing was written.
        OptionError: an argument has a value that it cannot take.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv 2105.07576, section 3
    (precise BatchNorm).
    """
    if method not in ("ema", "average", "pooled"):
        raise OptionError(f'method={method!r} is none of "ema", "average", "pooled"')
    if on_nonfinite not in ("raise", "skip"):
        raise OptionError(f'on_nonfinite={on_nonfinite!r} is neither "raise" nor "skip"')
    inner = unwrapped(model)
    sites, left = choose(inner, where)
    # Where the graph shows each norm called exactly once, nothing comes after the last of them.
    # Where it does not, batches may take different ways, and forwards run to the end.
    once = forward is None and all(site.certainly_once for site in sites)
    collector = _Collector(sites, method, may_end_early=once)
    started = time.perf_counter()
    place = torch.device(device) if device is not None else _device_of(inner)
    counts = {"batches": 0, "samples": 0, "skipped": 0}
    with ExitStack() as around:
        around.enter_context(torch.no_grad())
        around.enter_context(kept_modes(inner))
        around.enter_context(kept_random_state())
        for module in inner.modules():
            module.training = False
        for site in sites:
            site.module.training = True
        around.enter_context(measuring(sites, collector.receive))
        stream = batches_of(
            loader, batches=batches, samples=samples, progress=progress, title="Warm-up"
        )
        for index, batch in enumerate(stream):
            try:
                with _autocast(amp, place):
                    call(inner, moved(batch, place), forward)
            except _LastNormReached:
                pass
            kept = collector.close_batch(index, skip=on_nonfinite == "skip")
            counts["batches"] += kept
            counts["skipped"] += not kept
            counts["samples"] += batch_size(batch) if kept else 0
    rows = _write(sites, collector.accumulators, group, method)
    rows += [Drift(path, reason) for path, reason in left.items()]
    return WarmupReport(rows, method=method, seconds=time.perf_counter() - started, **counts)


class _LastNormReached(BaseException):
    """Ends a forward once nothing is left in it to measure; no ``except Exception`` stops it."""


class _Collector:
    """Gathers what the norms measure, and lets it count once the batch proves sound."""

    def __init__(self, sites: list[NormSite], method: Method, *, may_end_early: bool) -> None:
        self.accumulators = {site.path: _accumulator(site, method) for site in sites}
        self._pending: list[tuple[NormSite, Batch]] = []
        self._may_end_early = may_end_early
        self._saw_whole_forward = False

    def receive(self, site: NormSite, batch: Batch) -> None:
        """Take what one call measured; end the forward if it was the last."""
        self._pending.append((site, batch))
        if (
            self._saw_whole_forward
            and self._may_end_early
            and len(self._pending) == len(self.accumulators)
        ):
            raise _LastNormReached

    def close_batch(self, index: int, *, skip: bool) -> bool:
        """Take in what the batch brought; return whether it counts."""
        pending, self._pending = self._pending, []
        # What a graph cannot know, such as how many inputs a list holds, a whole forward shows.
        if not self._saw_whole_forward:
            self._saw_whole_forward = True
            self._may_end_early &= len(pending) == len(self.accumulators)
        if not pending:
            return True
        measured = torch.cat([torch.cat([batch.mean, batch.var]) for _, batch in pending])
        if not bool(measured.isfinite().all()):
            if skip:
                return False
            site = next(s for s, b in pending if not bool((b.mean + b.var).isfinite().all()))
            raise StatisticsError(
                f"{site.label}: values that are not finite in batch {index} (counted from 0); "
                'mend the data or the model, or leave such batches out by on_nonfinite="skip"'
            )
        for site, batch in pending:
            if batch.count and not bool((batch.var == UNTOUCHED).all()):
                self.accumulators[site.path].add(batch)
        return True


def _accumulator(site: NormSite, method: Method) -> Accumulator:
    mean, var = _statistics(site)
    if method == "ema":
        tracked = site.state.num_batches_tracked
        return Ema(
            mean,
            var,
            momentum=site.state.momentum,
            batches=0 if tracked is None else int(tracked),
        )
    # Statistics of single samples are averaged over samples: there is no variance between them
    # in what InstanceNorm keeps.
    by_samples = site.state.rule.train.over != "batch"
    if by_samples or method == "average":
        weighted = by_samples and method == "pooled"
        return Average(site.num_features, precise(mean).device, by_samples=weighted)
    return Pooled(site.num_features, precise(mean).device)


def _write(
    sites: list[NormSite], accumulators: dict[str, Accumulator], group: Any, method: Method
) -> list[Drift]:
    """Merge the ranks and write every norm's statistics, or on any exception none."""
    merge_ranks(list(accumulators.values()), group)
    if not any(accumulator.calls for accumulator in accumulators.values()):
        raise StatisticsError(
            "no norm was reached with data, so nothing was written: is the loader empty or "
            "used up, or does forward= not run the model?"
        )
    changes = Changes()
    rows = []
    for site in sites:
        accumulator = accumulators[site.path]
        if not accumulator.calls:
            rows.append(Drift(site.path, "not reached by the forward"))
            continue
        try:
            mean, var = accumulator.result()
        except StatisticsError as error:
            raise StatisticsError(f"{site.label}: {error}; feed more data") from None
        old_mean, old_var = _statistics(site)
        rows.append(
            drift(
                site.path,
                accumulator.calls,
                (precise(old_mean), precise(old_var)),
                (mean, var),
            )
        )
        changes.writes += [(old_mean, mean), (old_var, var)]
        counter = site.state.num_batches_tracked
        if counter is not None:
            seen = accumulator.calls + (int(counter) if method == "ema" else 0)
            changes.writes.append((counter, torch.full_like(counter, seen)))
    changes.make(nn.Module())
    return rows


def _statistics(site: NormSite) -> tuple[Tensor, Tensor]:
    mean, var = site.state.running_mean, site.state.running_var
    if mean is None or var is None:
        raise StatisticsError(f"{site.label}: it keeps no running statistics")
    return mean, var


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _autocast(amp: torch.dtype | bool | None, device: torch.device) -> Any:
    if amp is None or amp is False:
        return nullcontext()
    return torch.autocast(device.type, dtype=None if amp is True else amp)
