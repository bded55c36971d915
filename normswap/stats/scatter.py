"""How far weighted averages may be off, judged by how much the batches differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from normswap.stats.accumulate import Terms

__all__ = ["Scatter"]

#: With fewer batches than this, how much they differ is itself hardly known.
FEWEST_BATCHES = 8
#: A standard deviation under this share of the mean is what rounding makes of a constant.
ROUNDING = 1e-10


class Scatter:
    """Follows the standard errors of mean and variance, channel by channel.

    Both are functions of weighted averages over the batches: of the means m and of the squares q
    (see `Terms`), each from an origin, the variance is avg(q) - avg(m)² or, where the variance
    between batches is not part of it, avg(q). Batches are drawn independently, the values within
    one are not, and their weights differ: the standard error follows from the residuals of the
    linearized function, weight · (1, m, q) · slope, one a batch.

    Woodruff, "A Simple Method for Approximating the Variance of a Complicated Estimate", 1971.
    Not all batches count in full when some are heavier: of n weights w_i as many are effective
    as (Σ w_i)² / Σ w_i² (Kish, "Survey Sampling", 1965).

    Args:
        num_features: channels.
        device: where the numbers are kept.
        between: whether the variance includes that between the batches' means.
    """

    NAMES: ClassVar = ("origin", "sums", "squares")

    def __init__(self, num_features: int, device: torch.device, *, between: bool) -> None:
        self._between = between
        #: near the means, (C,), so that no digits are lost
        self.origin = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.sums = self.origin.new_zeros(3, num_features)
        self.squares = self.origin.new_zeros(3, 3, num_features)

    def settle_origin(self, near: Tensor) -> None:
        """Let the origin be ``near`` (C,), in the channels of which nothing was seen yet."""
        self.origin = torch.where(self.sums[0] > 0, self.origin, near)

    def add(self, calls: Sequence[Terms]) -> None:
        """Take in what the calls of one batch contribute, which are not independent."""
        rows = [
            each.weight * torch.stack([torch.ones_like(each.mean), each.mean, each.square])
            for each in calls
        ]
        batch = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        self.sums = self.sums + batch
        self.squares = self.squares + batch.unsqueeze(0) * batch.unsqueeze(1)

    def errors(self) -> Tensor:
        """Standard errors of the mean, in standard deviations, and of the variance, relative.

        Returns:
            (2, C), not a number where too few batches were seen.
        """
        weight = self.sums[0]
        _, mean, square = self.sums / weight
        bend = mean if self._between else torch.zeros_like(mean)
        var = square - bend.square()
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        slopes = torch.stack(
            [torch.stack([-mean, one, zero]), torch.stack([bend.square() - var, -2 * bend, one])]
        )
        residuals = torch.einsum("fic,ijc,fjc->fc", slopes, self.squares, slopes)
        effective = weight.square() / self.squares[0, 0]
        squared = residuals / weight.square() * (effective / (effective - 1))
        # A constant is known once it is seen.
        varies = var > (ROUNDING * (self.origin + mean)).square()
        relative = torch.where(varies, squared / torch.stack([var, var.square()]), 0)
        return relative.clamp(min=0).sqrt().where(effective >= FEWEST_BATCHES, torch.nan)

    def state(self) -> dict[str, Tensor]:
        """All there is to remember, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Be as `state` was."""
        for name in self.NAMES:
            setattr(self, name, tensors[name].to(self.origin.device))
