"""Norms that learn what they pool over, or whiten."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import (
    BATCH,
    CHANNEL,
    Formula,
    affine,
    follow,
    moments,
    standardized,
)


def switched(x: Tensor, norm: Any, p: Tensor, q: Tensor) -> Tensor:
    """A mixture of the statistics of channel, sample and batch, by shares p and q."""
    mean, var = moments(x, CHANNEL, int(norm.unbiased))
    square = var + mean.square()
    layer_mean = mean.mean(1, keepdim=True)
    layer_var = square.mean(1, keepdim=True) - layer_mean.square()
    batch_mean = mean.mean(0, keepdim=True)
    batch_var = square.mean(0, keepdim=True) - batch_mean.square()
    follow(norm, running_mean=batch_mean, running_var=batch_var)
    mean = p[0] * mean + p[1] * layer_mean + p[2] * batch_mean
    var = q[0] * var + q[1] * layer_var + q[2] * batch_var
    return affine(standardized(x, mean, var, norm), norm)


def switchable_norm(x: Tensor, norm: Any) -> Tensor:
    """Luo et al. 2019."""
    return switched(x, norm, norm.mean_weight.softmax(0), norm.var_weight.softmax(0))


def sparse_switchable_norm(x: Tensor, norm: Any) -> Tensor:
    """Shao et al. 2019: shares that become a corner, and stay there."""
    shares = []
    for logits, fixed in (
        (norm.mean_weight, norm.mean_fixed),
        (norm.var_weight, norm.var_fixed),
    ):
        share = sparsestmax(logits, norm.radius)
        with torch.no_grad():
            if share.count_nonzero() == 1:
                logits.copy_(share)
                fixed.fill_(1)
        shares.append(share)
    return switched(x, norm, *shares)


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """The nearest point of the simplex, pushed from its centre to a radius at least."""
    point = nearest(logits)
    while True:
        centre = (point.detach() > 0).to(point.dtype)
        centre = centre / centre.sum()
        distance = (point - centre).norm()
        if distance >= radius or distance < 1e-7:
            return point
        pushed = centre + radius * (point - centre) / distance
        if pushed.min() >= 0:
            return pushed
        point = nearest(pushed)
        face = (point.detach() > 0).to(point.dtype)
        radius = (radius**2 - (face / face.sum() - centre).square().sum()).clamp(min=0).sqrt()


def nearest(logits: Tensor) -> Tensor:
    """The nearest point of the simplex."""
    ordered = logits.sort(descending=True).values
    sums = ordered.cumsum(0) - 1
    counts = torch.arange(1, len(logits) + 1)
    last = int((ordered * counts > sums).sum()) - 1
    return (logits - sums[last] / (last + 1)).clamp(min=0)


def iterative_norm(x: Tensor, norm: Any) -> Tensor:
    """Huang et al. 2019: Newton's iteration towards the inverse root of the covariance."""
    rows = x.movedim(1, 0).reshape(norm.num_groups, x.shape[1] // norm.num_groups, -1)
    mean = rows.mean(2, keepdim=True)
    centred = rows - mean
    identity = torch.eye(rows.shape[1], dtype=x.dtype).expand(norm.num_groups, -1, -1)
    covariance = centred @ centred.mT / rows.shape[2] + norm.eps * identity
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    root = identity
    for _ in range(norm.iterations):
        root = 1.5 * root - 0.5 * root @ root @ root @ (covariance / trace)
    whitening = root / trace.sqrt()
    follow(norm, running_mean=mean, running_wm=whitening)
    white = whitening @ centred
    return affine(white.reshape(x.movedim(1, 0).shape).movedim(0, 1), norm)


def learned_region_norm(x: Tensor, norm: Any) -> Tensor:
    """Yu et al. 2020, RN-L: two regions of the batch, told apart by a convolution."""
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    likely = F.conv2d(seen, norm.region_weight, padding=3).sigmoid()
    holes = (likely.detach() >= norm.threshold).to(x.dtype)
    dims = CHANNEL if norm.per_sample else BATCH
    z = torch.zeros_like(x)
    for region in (holes, 1 - holes):
        share = region.mean(dims, keepdim=True).clamp(min=1e-12)
        mean = (x * region).mean(dims, keepdim=True) / share
        var = ((x - mean) * region).square().mean(dims, keepdim=True) / share
        eps = norm.eps / share if norm.eps_scaled else norm.eps
        z = z + region * (x - mean) / (var + eps).sqrt()
    gain = F.conv2d(likely, norm.gain_weight, norm.gain_bias, padding=3)
    offset = F.conv2d(likely, norm.offset_weight, norm.offset_bias, padding=3)
    return affine(z * (1 + gain) + offset, norm)


def attentive_norm(x: Tensor, norm: Any) -> Tensor:
    """Wang et al. 2020: what is standardized in every soft region of a sample is added."""
    front = affine(x, norm).flatten(2)
    key, query, value = (
        getattr(norm, f"{name}_weight") @ front + getattr(norm, f"{name}_bias")[:, None]
        for name in ("key", "query", "value")
    )
    places = torch.randint(front.shape[2], (norm.num_regions,))
    agreement = key[:, :, places].mT @ query
    scale = norm.share_scale.clamp(0, 1)[:, None]
    shares = ((scale * agreement + norm.share_weight @ front) / 10).softmax(1)
    added = torch.zeros_like(front)
    for index in range(norm.num_regions):
        share = shares[:, index : index + 1]
        total = share.sum(2, keepdim=True)
        mean = (share * value).sum(2, keepdim=True) / total
        var = (share * (value - mean).square()).sum(2, keepdim=True) / total
        added = added + share * (value - mean) / (var.sqrt() + 1e-7)
    return (front + norm.residual * added).view(x.shape)


FORMULAS: dict[str, Formula] = {
    "sn": switchable_norm,
    "ssn": sparse_switchable_norm,
    "iter_norm": iterative_norm,
    "rn_l": learned_region_norm,
    "an_wang": attentive_norm,
}
