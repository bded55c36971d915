"""Formulas of norms of moments that keep more than a mean and a variance, or in other terms.

As in `tests.reference.beyond`: ``formula(x, parameters, buffers, training) -> y``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.beyond import Formula, Tensors, along, follow, scaled


def batch_renorm(r_max: float | None = None, d_max: float | None = None) -> Formula:
    """Ioffe 2017, with the paper's limits or with others."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        kept_mean, kept_std = buffers["running_mean"], buffers["running_std"]
        if not training:
            return scaled((x - along(kept_mean, x)) / along(kept_std, x), parameters)
        step = int(buffers["num_batches_tracked"])
        r_most = min(max(1 + 2 * (step - 5000) / 35000, 1), 3) if r_max is None else r_max
        d_most = min(max(5 * (step - 5000) / 20000, 0), 5) if d_max is None else d_max
        mean, var = over(x)
        std = (var + 1e-5) ** 0.5
        r = (std / kept_std).clamp(1 / r_most, r_most).detach()
        d = ((mean - kept_mean) / kept_std).clamp(-d_most, d_most).detach()
        follow(buffers, running_mean=mean, running_std=std)
        z = (x - along(mean, x)) / along(std, x)
        return scaled(z * along(r, x) + along(d, x), parameters)

    return formula


def trans_norm(*cut: int) -> Formula:
    """Wang et al. 2019, where several ranks have as many samples each; one has all by default."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        kept = {
            name: (buffers[f"running_mean_{name}"], buffers[f"running_var_{name}"])
            for name in ("source", "target")
        }
        if not training:
            mean, var = kept["target"]
            z = (x - along(mean, x)) / along(var + 1e-5, x) ** 0.5
            return scaled(z, parameters) * along(1 + agreement(*kept.values()), x)
        domains: dict[str, list[int]] = {"source": [], "target": []}
        first = 0
        for samples in cut or (len(x),):
            middle, last = first + samples // 2, first + samples
            domains["source"] += range(first, middle)
            domains["target"] += range(middle, last)
            first = last
        z = torch.zeros_like(x)
        for name, mine in domains.items():
            mean, var = over(x[mine])
            z[mine] = (x[mine] - along(mean, x)) / along(var + 1e-5, x) ** 0.5
            values = x[mine].numel() // x.shape[1]
            kept[name] = mean.detach(), var.detach() * values / (values - 1)
        follow(
            buffers,
            **{f"running_mean_{name}": mean for name, (mean, _) in kept.items()},
            **{f"running_var_{name}": var for name, (_, var) in kept.items()},
        )
        return scaled(z, parameters) * along(1 + agreement(*kept.values()), x)

    return formula


def attentive_batch_norm(way: int, mixtures: int = 10) -> Formula:
    """Li et al. 2020, by the number of the attention in their code."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        kept: Tensors = {}
        positions = x[0, 0].numel()
        rows = x.reshape(*x.shape[:2], -1)
        mean = rows.sum(2) / positions
        var = ((rows - mean[..., None]) ** 2).sum(2) / max(positions - 1, 1)
        features = mean / (var + 1e-3) ** 0.5

        def mapped(features: Tensor, layer: str) -> Tensor:
            y = features @ parameters[f"{layer}_weight"].T
            if way in (0, 1, 4):
                return y + parameters[f"{layer}_bias"]
            centre, spread = buffers[f"{layer}_mean"], buffers[f"{layer}_var"]
            if training:
                centre, spread = over(y)
                kept[f"{layer}_mean"] = centre
                kept[f"{layer}_var"] = spread * len(y) / (len(y) - 1)
            z = (y - centre) / (spread + 1e-5) ** 0.5
            return z * parameters[f"{layer}_gain"] + parameters[f"{layer}_bias"]

        if way in (1, 3):
            hidden = mapped(features, "hidden")
            features = torch.where(hidden > 0, hidden, 0)
        logits = mapped(features, "attention")
        if way in (2, 3, 4):
            shares = torch.where(logits > -3, torch.where(logits < 3, (logits + 3) / 6, 1), 0)
        elif way == 6:
            shares = logits.exp() / logits.exp().sum(1, keepdim=True)
        else:
            shares = 1 / (1 + (-logits).exp())
        factor = 1 if way == 6 else 2 / mixtures
        mean, var = buffers["running_mean"], buffers["running_var"]
        if training:
            mean, var = over(x)
            values = x.numel() // x.shape[1]
            follow(buffers, running_mean=mean, running_var=var * values / (values - 1), **kept)
        z = (x - along(mean, x)) / along(var + 1e-5, x) ** 0.5
        y = torch.zeros_like(x)
        for k, share in enumerate(shares.T):
            rows_of_k = {
                name: factor * (parameters.get(name, plain) + parameters[f"{name}_delta"][k])
                for name, plain in (("weight", 1), ("bias", 0))
            }
            y = y + share.reshape(-1, *[1] * (x.ndim - 1)) * scaled(z, rows_of_k)
        return y

    return formula


def agreement(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """How much more a channel counts whose standardized means are near each other."""
    far = (source[0] / (source[1] + 1e-5) ** 0.5 - target[0] / (target[1] + 1e-5) ** 0.5).abs()
    near = 1 / (1 + far)
    return len(near) * near / near.sum()


def over(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    rows = x.movedim(1, 0).reshape(x.shape[1], -1)
    mean = rows.sum(1) / rows.shape[1]
    return mean, ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
