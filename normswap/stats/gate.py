"""Standing at a norm that waits for the statistics of all batches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.errors import StatisticsError
from normswap.graph.site import NormSite
from normswap.stats.accumulate import Batch, precise
from normswap.stats.lockstep import meet
from normswap.stats.moments import channel_moments
from normswap.stats.own_terms import in_own_terms
from normswap.stats.probe import Probe

__all__ = ["Gate", "NotFinite", "require_finite"]


class Gate(Probe):
    """Lets a norm wait for its statistics, and compute by them as it does in eval mode.

    Args:
        site: where the norm is.
        place: its number among those that wait.
    """

    def __init__(self, site: NormSite, place: int) -> None:
        super().__init__(site)
        self._place = place
        self._lent: object = None

    def attributes(self) -> dict[str, Any]:
        """Eval mode."""
        return {"training": False}

    def before(self, x: Tensor) -> None:
        """Wait, and let the norm's running statistics be those of all data."""
        values = x.numel() // self.site.num_features  # whatever reads x has it in memory, too
        answer = meet(self._place, partial(self._bring, x, values), lambda: x[:1].clone())
        if answer is not self._lent:
            self._lent = answer
            self.lend(*answer)

    def _bring(self, x: Tensor, values: int, index: int) -> Batch:
        if not values:
            nothing = precise(torch.zeros(self.site.num_features, device=x.device))
            return Batch(0, 0, nothing, nothing)
        batch = Batch(values, x.shape[0], *channel_moments(x, self.site.channel_dim))
        batch = in_own_terms(self.site, x, batch)
        require_finite(self.site, batch, index)
        return batch


class NotFinite(StatisticsError):
    """A batch whose values are not finite at some norm."""


def require_finite(site: NormSite, batch: Batch, index: int) -> None:
    """Raise `NotFinite` if a batch's statistics at a norm are not finite.

    Args:
        site: the norm.
        batch: what was measured there.
        index: the batch's number.
    """
    if not math.isfinite((batch.mean + batch.var).sum()):
        raise NotFinite(
            f"{site.label}: values that are not finite in batch {index} (counted from 0); mend "
            "the data or the model, or leave the batch out of the loader (on_nonfinite="
            '"skip" does it for batches that are so when they reach their first norm)'
        )
