"""The passes in plain torch operations, for any device and any strides."""

from __future__ import annotations

from torch import Tensor

from normswap.norms.passes.shapes import beside, positions_last, work_dtype

__all__ = ["channel_sums", "combined", "moments", "scaled", "two_pass"]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions."""
    return two_pass(positions_last(x).to(work_dtype(x)), -1)


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset."""
    return (x * beside(gain, x)).add_(beside(offset, x)).to(x.dtype)


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy."""
    values = positions_last(dy).to(mean.dtype)
    centred = positions_last(x) - mean[..., None]
    return (values * centred).sum(-1), values.sum(-1)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift."""
    total = (dy * beside(gain, x)).addcmul_(x.to(gain.dtype), beside(slope, x))
    return total.add_(beside(shift, x)).to(x.dtype)


def two_pass(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, corrected for what the mean was rounded by."""
    near = values.mean(dim, keepdim=True)
    centred = values - near
    off = centred.mean(dim)
    var = centred.square().mean(dim) - off.square()
    return near.squeeze(dim) + off, var.clamp_(min=0)
