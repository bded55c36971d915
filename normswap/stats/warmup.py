"""Estimating the running statistics of a model's norms on data, before or after training."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from normswap.errors import OptionError
from normswap.graph.site import NormSite
from normswap.randomness import kept_random_state
from normswap.stats.batchwise import batchwise
from normswap.stats.bookmark import Bookmark, fingerprint
from normswap.stats.choice import choose
from normswap.stats.distributed import failing_together, rank_of
from normswap.stats.feed import Feed, Forward, device_of, uncompiled, unwrapped
from normswap.stats.free_memory import half_of_free
from normswap.stats.keeping import kept_attributes, kept_modes, kept_settings
from normswap.stats.population import population
from normswap.stats.report import Drift, WarmupReport
from normswap.stats.writing import write
from normswap.swap.select import Selector

__all__ = ["Method", "warmup"]

Method = Literal["ema", "average", "pooled", "population"]


def warmup(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: Method = "pooled",
    batches: int | None = None,
    samples: int | None = None,
    tol: float | None = None,
    forward: Forward | None = None,
    where: Selector | None = None,
    device: torch.device | str | None = None,
    amp: torch.dtype | bool | None = None,
    group: Any = None,
    memory: int | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> WarmupReport:
    """Estimate the running statistics of a model's normalizations in one pass over data.

    Only the norms run in train mode; everything else, dropout and stochastic depth included, is
    in eval mode. The statistics are written in place, at the end, all or none, as torch keeps
    them: the mean, the unbiased variance, and the number of batches seen. Modes, momentum, hooks,
    attributes that forwards set, and random states are as before afterwards. With a process group
    every rank reads its own loader and all end with the same statistics.

    Args:
        model: any module with BatchNorm layers or others that keep running statistics.
        loader: any iterable of batches. A batch that is a tensor is passed as it is; of a tuple
            or list the first item; a mapping as those keywords that the forward accepts.
        method: ``"pooled"``: exact mean and total variance over all values, each norm fed by
            norms that use their batch statistics. ``"average"``: the mean of the batches'
            statistics. ``"ema"``: the moving average that training keeps. ``"population"``: as
            of one train-mode forward of all data as a single batch, however it is cut: each norm
            is fed by norms that use their final statistics already, as in eval mode.
        batches: read at most as many batches.
        samples: stop after the batch that reaches as many samples.
        tol: stop when the standard error of every norm's mean, in standard deviations, and of
            its variance, relative to it, are at most this: root mean square over the channels,
            judged by how much the batches differ. Each rank judges its own. Not for ``"ema"``
            and ``"population"``.
        forward: ``forward(model, batch)`` for models that are called otherwise.
        where: which norms, see `normswap.plan`. Default: those in train mode, or all if none is;
            what is held frozen is left alone and reported.
        device: where batches are moved. Default: where the model's first parameter is.
        amp: run under autocast: a dtype, or true for the device's default.
        group: the process group to merge over. Default: the default one, if there is one.
        memory: bytes that ``"population"`` may hold of what its forwards still need; the rest
            lies in a temporary file. Default: half of what is free.
        on_nonfinite: what to do about a batch with values that are not finite: ``"raise"``, or
            ``"skip"`` and count it in the report.
        resume: a file that tells now and then how far the pass has got (rank r of several adds
            ``.r`` to its name). If it is there, the pass goes on from it, with results equal to
            the bit; the loader has to yield the same batches again. It is deleted at the end.
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
    _check(method, tol, on_nonfinite, memory)
    started = time.perf_counter()
    inner = unwrapped(model)
    sites, left = choose(inner, where)
    place = device_of(inner, device)
    feed = Feed(loader, batches, samples, forward, place, amp, progress, "Warm-up")
    about = {} if resume is None else _identity(inner, sites, method, feed, on_nonfinite)
    bookmark = Bookmark(resume, about, rank=rank_of(group))
    common: dict[str, Any] = {
        "skip_nonfinite": on_nonfinite == "skip",
        "bookmark": bookmark,
        "group": group,
    }
    with failing_together(group):
        with ExitStack() as around:
            around.enter_context(torch.no_grad())
            around.enter_context(uncompiled())
            around.enter_context(kept_settings())
            around.enter_context(kept_attributes(inner))
            around.enter_context(kept_modes(inner))
            around.enter_context(kept_random_state())
            for module in inner.modules():
                module.training = False
            if method == "population":
                memory = half_of_free(place) if memory is None else memory
                gathered = population(inner, sites, feed, memory=memory, **common)
            else:
                gathered = batchwise(inner, sites, feed, method=method, tol=tol, **common)
        rows = write(sites, gathered.accumulators, counting_on=method == "ema")
    bookmark.remove()
    return WarmupReport(
        [*rows, *(Drift(path, reason) for path, reason in left.items())],
        method=method,
        batches=gathered.batches,
        samples=gathered.samples,
        skipped=len(gathered.left_out),
        seconds=time.perf_counter() - started,
        passes=gathered.passes,
        tol=tol,
        convergence=gathered.convergence.points,
    )


def _check(method: str, tol: float | None, on_nonfinite: str, memory: int | None) -> None:
    """Raise `OptionError` for what the arguments cannot be."""
    if method not in get_args(Method):
        known = ", ".join(f'"{name}"' for name in get_args(Method))
        raise OptionError(f"method={method!r} is none of {known}")
    if on_nonfinite not in ("raise", "skip"):
        raise OptionError(f'on_nonfinite={on_nonfinite!r} is neither "raise" nor "skip"')
    if tol is not None and not tol > 0:
        raise OptionError(f"tol={tol} is no tolerance; give one above 0, such as 0.01, or None")
    if tol is not None and method == "ema":
        raise OptionError(
            'a moving average never settles, so tol= has no meaning for method="ema"; use "pooled"'
        )
    if tol is not None and method == "population":
        raise OptionError(
            'method="population" has read all its data before the second norm is known, so tol= '
            'cannot stop it; use samples=, or method="pooled"'
        )
    if memory is not None and method != "population":
        raise OptionError(
            f'memory= is what method="population" may hold; method={method!r} holds one batch'
        )
    if memory is not None and memory < 0:
        raise OptionError(f"memory={memory} is no number of bytes; give 0 or more, or None")


def _identity(
    model: nn.Module, sites: list[NormSite], method: str, feed: Feed, on_nonfinite: str
) -> dict[str, Any]:
    """What a bookmark has to agree with, by name."""
    return {
        "method": method,
        "forward": _name_of(feed.forward),
        "amp": str(feed.amp) if feed.amp else None,
        "on_nonfinite": on_nonfinite,
        "norms": [site.path for site in sites],
        "model": fingerprint(model),
    }


def _name_of(function: Any) -> str | None:
    """What tells a function from others in another process, where it has another address."""
    if function is None:
        return None
    if isinstance(function, partial):
        return _name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
