"""Writing statistics into a model: in place, all or none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.graph.site import NormSite
from normswap.norms.measured import MeasuredNorm
from normswap.stats.accumulate import Accumulator, precise
from normswap.stats.report import Drift, drift
from normswap.swap.changes import Changes

__all__ = ["statistics_of", "write"]


def write(
    sites: list[NormSite], accumulators: dict[str, Accumulator], *, counting_on: bool
) -> list[Drift]:
    """Write every norm's statistics, or on any exception none.

    Args:
        sites: the norms.
        accumulators: for each norm's path what was seen, on all ranks.
        counting_on: add to the number of batches that the norms have seen, not set it.

    Returns:
        How far each norm's statistics moved.

    Raises:
        StatisticsError: nothing was seen, or of some norm too little.
    """
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
        old_mean, old_var = statistics_of(site)
        before = (precise(old_mean), precise(old_var))
        rows.append(drift(site.path, accumulator.calls, before, (mean, var)))
        counter, seen = site.state.num_batches_tracked, None
        if counter is not None:
            calls = accumulator.calls + (int(counter) if counting_on else 0)
            seen = torch.full_like(counter, calls)
        changes.writes += _kept(site, mean, var, seen)
    changes.make(nn.Module())
    return rows


def _kept(
    site: NormSite, mean: Tensor, var: Tensor, seen: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """The tensors in which a norm keeps statistics, each with what is to be in it."""
    module, counter = site.module, site.state.num_batches_tracked
    if isinstance(module, MeasuredNorm) and site.state.retold:
        measured = replace(site.state, running_mean=mean, running_var=var, num_batches_tracked=seen)
        told = module.kept(measured)
        return [(module.get_buffer(name), value) for name, value in told.items()]
    writes = list(zip(statistics_of(site), (mean, var), strict=True))
    return writes if counter is None or seen is None else [*writes, (counter, seen)]


def statistics_of(site: NormSite) -> tuple[Tensor, Tensor]:
    """The running mean and variance, (C,) each, that a norm keeps."""
    mean, var = site.state.running_mean, site.state.running_var
    if mean is None or var is None:
        raise StatisticsError(f"{site.label}: it keeps no running statistics")
    return mean, var
