"""Fitting a gain and an offset per channel that bring one signal as near to another as may be."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normswap.stats.accumulate import Mergeable

__all__ = ["Fit", "Joint"]

Fit = Literal["least_squares", "moments"]

#: As many values are held in double precision at a time.
VALUES = 1 << 20
#: A variance below this part of the mean square is what rounding leaves of a constant.
NOISE = 1e-12


class Joint(Mergeable):
    """Means, variances and covariance of two signals z and y, channel by channel.

    ``mean`` holds the means of z and of y, one after the other; ``spread`` the sums of squared
    deviations of z and of y, and of the products of both. Merged by Chan's rule.

    Args:
        num_features: channels, C.
        device: where it is.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        super().__init__(2 * num_features, 3 * num_features, device)

    def see(self, z: Tensor, y: Tensor, channel_dim: int) -> None:
        """Take in both signals, of the same shape."""
        self.calls += 1
        if not z.numel():
            return
        both = [signal.movedim(channel_dim, 1).flatten(2 if z.ndim > 2 else 1) for signal in (z, y)]
        samples = max(1, VALUES * len(z) // z.numel())
        for parts in zip(*(torch.split(signal, samples) for signal in both), strict=True):
            z_part, y_part = (p.transpose(0, 1).flatten(1).to(self.mean) for p in parts)
            means = [z_part.mean(1), y_part.mean(1)]
            z_rest, y_rest = z_part - means[0][:, None], y_part - means[1][:, None]
            products = ((z_rest, z_rest), (y_rest, y_rest), (z_rest, y_rest))
            spread = torch.cat([(a * b).sum(1) for a, b in products])
            self.merge(torch.full_like(self.weight, z_part.shape[1]), torch.cat(means), spread)

    def merge(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Take in the numbers of another."""
        total = self.weight + weight
        if total == 0:
            return
        delta = mean - self.mean
        z, y = delta.chunk(2)
        between = torch.cat([z * z, y * y, z * y])
        self.mean = self.mean + delta * (weight / total)
        self.spread = self.spread + spread + between * (self.weight * weight / total)
        self.weight = total

    def fit(self, method: Fit, gain: Tensor, *, offset: bool) -> tuple[Tensor, Tensor]:
        """The gain and the offset, (C,) each, that bring z nearest to y.

        Args:
            method: ``"least_squares"``: the least mean square difference. ``"moments"``: equal
                mean and variance.
            gain: the gain so far (C,): its sign is kept where moments do not tell one, and it
                stays where z is constant.
            offset: whether there is an offset; without one it is zero.
        """
        z_mean, y_mean = self.mean.chunk(2)
        zz, yy, zy = self.spread.chunk(3)
        varies = zz > NOISE * (zz + self.weight * z_mean.square())
        if not offset:  # about zero, not about the mean
            zz = zz + self.weight * z_mean.square()
            yy = yy + self.weight * y_mean.square()
            zy = zy + self.weight * z_mean * y_mean
            varies = zz > 0
        if method == "least_squares":
            fitted = zy / zz
        else:
            fitted = (yy / zz).sqrt() * torch.where(gain < 0, -1.0, 1.0)
        fitted = torch.where(varies, fitted, gain.to(fitted))
        shift = y_mean - fitted * z_mean
        return fitted, shift if offset else torch.zeros_like(shift)
