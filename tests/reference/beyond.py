"""Formulas of norms that are no arithmetic on each channel's mean and variance.

Plain float64 arithmetic: ``formula(x, parameters, buffers, training) -> y`` for inputs (N, C, ...)
and tensors by name; it puts new tensors into ``buffers`` where the norm updates its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Formula = Callable[[Tensor, Tensors, Tensors, bool], Tensor]


def dynamic_tanh(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Zhu et al. 2025: tanh by exponentials."""
    grown, shrunk = (parameters["alpha"] * x).exp(), (-parameters["alpha"] * x).exp()
    return scaled((grown - shrunk) / (grown + shrunk), parameters)


def dynamic_erf(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Chen et al. 2025: erf by the normal distribution function."""
    inside = parameters["alpha"] * x + parameters["shift"]
    return scaled(2 * torch.special.ndtr(inside * math.sqrt(2)) - 1, parameters)


def scale_norm(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Nguyen and Salazar 2019: unit vectors, times a length."""
    length = (x * x).sum(1, keepdim=True) ** 0.5
    return scaled(parameters["scale"] * x / torch.where(length > 1e-5, length, 1e-5), parameters)


def l1_batch_norm(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Wu et al. 2018, keeping the scale itself."""
    if training:
        rows = x.movedim(1, 0).reshape(x.shape[1], -1)
        values = rows.shape[1]
        mean = rows.sum(1) / values
        away = rows - mean[:, None]
        scale = math.sqrt(math.pi / 2) * torch.where(away > 0, away, -away).sum(1) / values
        follow(buffers, running_mean=mean, running_scale=scale)
    else:
        mean, scale = buffers["running_mean"], buffers["running_scale"]
    return scaled((x - along(mean, x)) / along(scale + 1e-5, x), parameters)


def iterative_norm(groups: int, iterations: int = 5) -> Formula:
    """Huang et al. 2019, group by group, with a mean of the whitening matrices for eval."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        rows = x.movedim(1, 0).reshape(x.shape[1], -1)
        parts, means, matrices = [], [], []
        channels = x.shape[1] // groups
        for group in range(groups):
            part = rows[group * channels : (group + 1) * channels]
            if training:
                mean = part.sum(1) / part.shape[1]
                away = part - mean[:, None]
                covariance = away @ away.T / part.shape[1] + 1e-5 * torch.eye(channels).to(x)
                scale = covariance.trace()
                matrix = torch.eye(channels).to(x)
                for _ in range(iterations):
                    power = torch.linalg.matrix_power(matrix, 3)
                    matrix = 1.5 * matrix - 0.5 * power @ (covariance / scale)
                matrix = matrix / scale**0.5
            else:
                mean = buffers["running_mean"][group * channels : (group + 1) * channels]
                matrix = buffers["running_wm"][group]
            means.append(mean)
            matrices.append(matrix)
            parts.append(matrix @ (part - mean[:, None]))
        if training:
            follow(buffers, running_mean=torch.cat(means), running_wm=torch.stack(matrices))
        white = torch.cat(parts).reshape(x.movedim(1, 0).shape).movedim(0, 1)
        return scaled(white, parameters)

    return formula


def local_context_norm(channels: int, window: int) -> Formula:
    """Ortiz et al. 2020: every window cut out of the map by itself."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        y = torch.zeros_like(x)
        for place in itertools.product(*map(range, x.shape[2:])):
            cut = []
            for at, length in zip(place, x.shape[2:], strict=True):
                size = min(window, length)
                first = max(0, min(at - (size - 1) // 2, length - size))
                cut.append(slice(first, first + size))
            for first in range(0, x.shape[1], channels):
                group = slice(first, first + channels)
                inside = x[(slice(None), group, *cut)].flatten(1)
                mean = inside.mean(1, keepdim=True)
                var = (inside - mean).square().mean(1, keepdim=True)
                here = (slice(None), group, *place)
                y[here] = (x[here] - mean) / (var + 1e-5) ** 0.5
        return scaled(y, parameters)

    return formula


def learned_region_norm(
    *, per_sample: bool = False, eps_scaled: bool = True, threshold: float = 0.8
) -> Formula:
    """Yu et al. 2020, RN-L: the values of every region gathered and standardized by themselves."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        seen = torch.stack([x.sum(1) / x.shape[1], x.max(1).values], 1)
        likely = 1 / (1 + (-correlated(seen, parameters["region_weight"])).exp())
        gain = correlated(likely, parameters["gain_weight"]) + parameters["gain_bias"]
        offset = correlated(likely, parameters["offset_weight"]) + parameters["offset_bias"]
        z = torch.zeros_like(x)
        for part in [slice(n, n + 1) for n in range(len(x))] if per_sample else [slice(None)]:
            holes = likely[part, 0] >= threshold
            for region in (holes, ~holes):
                if not region.any():
                    continue
                for channel in range(x.shape[1]):
                    inside = x[part, channel][region]
                    mean = inside.sum() / len(inside)
                    var = ((inside - mean) ** 2).sum() / len(inside)
                    eps = 1e-5 * (region.numel() / len(inside) if eps_scaled else 1)
                    z[part, channel][region] = (inside - mean) / (var + eps) ** 0.5
        return scaled(z * (1 + gain) + offset, parameters)

    return formula


def correlated(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution (1, in, 7, ...) of (N, in, ...) with zeros around, one shift after another."""
    reach = weight.shape[-1] // 2
    lengths = x.shape[2:]
    padded = torch.nn.functional.pad(x, [reach] * 2 * len(lengths))
    y = torch.zeros(len(x), 1, *lengths, dtype=x.dtype)
    for shift in itertools.product(range(weight.shape[-1]), repeat=len(lengths)):
        here = tuple(slice(s, s + length) for s, length in zip(shift, lengths, strict=True))
        kernel = weight[(0, slice(None), *shift)].reshape(1, -1, *[1] * len(lengths))
        y = y + (padded[(slice(None), slice(None), *here)] * kernel).sum(1, keepdim=True)
    return y


def attentive_norm(regions: int, *, official: bool = False) -> Formula:
    """Wang et al. 2020, one region after another; in training the places are drawn by torch."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        front = scaled(x, parameters)
        flat = front.reshape(*x.shape[:2], -1).movedim(1, 2)
        length = flat.shape[1]
        if training:
            places = torch.randint(length, (regions,)).tolist()
        else:
            places = [int((i + 0.5) * length / regions) for i in range(regions)]
        key, query, value = (
            flat @ parameters[f"{name}_weight"].T + parameters[f"{name}_bias"]
            for name in ("key", "query", "value")
        )
        logits = []
        for i, place in enumerate(places):
            agreement = (query * key[:, place : place + 1]).sum(2)
            scale = parameters["share_scale"][i].clamp(0, 1)
            logits.append((scale * agreement + flat @ parameters["share_weight"][i]) / 10)
        raised = torch.stack(logits).exp()
        added = torch.zeros_like(flat)
        for share in (raised / raised.sum(0)).unsqueeze(3):
            total = share.sum(1, keepdim=True)
            if official:
                total = total + 1e-7
                mean = (share * value).mean(1, keepdim=True) / total
                var = ((share * value - mean) ** 2).sum(1, keepdim=True) / total
            else:
                mean = (share * value).sum(1, keepdim=True) / total
                var = (share * (value - mean) ** 2).sum(1, keepdim=True) / total
            added = added + share * (value - mean) / (var.clamp(min=1e-21) ** 0.5 + 1e-7)
        return front + parameters["residual"] * added.movedim(2, 1).reshape(x.shape)

    return formula


def power_norm(warmup: int, *, group_scale: bool = True) -> Formula:
    """Shen et al. 2020 as in the released code; its backward is a hook on what is normalized."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        if group_scale:
            x = x / ((x**2).sum(1, keepdim=True) / x.shape[1] + 1e-5) ** 0.5
        kept = buffers["running_square"]
        if not training:
            return scaled(x / along(kept + 1e-5, x) ** 0.5, parameters)
        every = (0, *range(2, x.ndim))
        square = (x.detach() ** 2).mean(every)
        step = int(buffers["num_batches_tracked"]) + 1
        used = square if step <= warmup else kept
        z = (x.detach() / along(used + 1e-5, x) ** 0.5).requires_grad_()

        def backward(dz: Tensor) -> Tensor:
            slope = buffers["running_slope"]
            corrected = dz - (1 - 0.9) * along(slope, z) * z.detach()
            buffers["running_slope"] = slope + (corrected * z.detach()).mean(every)
            return corrected / along(square + 1e-5, x) ** 0.5

        if step < warmup:
            kept = kept * (step - 1) / step + square / step
        buffers["running_square"] = 0.9 * kept + 0.1 * square
        buffers["num_batches_tracked"] = torch.tensor(step)
        # Its value is that of z, its derivative one: the hook makes of that what the paper does.
        through = x - x.detach() + z.detach()
        through.register_hook(backward)
        return scaled(through, parameters)

    return formula


def moving_average_batch_norm(size: int, warmup: int) -> Formula:
    """Yan et al. 2020 as in the released code; its backward is a hook on what is normalized."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        kept = buffers["running_square"]
        if not training:
            return scaled(x / along(kept + 1e-5, x) ** 0.5, parameters)
        every = (0, *range(2, x.ndim))
        step = int(buffers["steps"]) + 1
        alone = step <= size or step < warmup

        def recent(name: str, new: Tensor) -> Tensor:
            slots = list(buffers[name])
            slots[step % size] = new
            buffers[name] = torch.stack(slots)
            return new if alone else sum(slots[1:], slots[0]) / size

        square = recent("recent_squares", (x.detach() ** 2).mean(every))
        z = x.detach() / along(square + 1e-5, x) ** 0.5

        def backward(dz: Tensor) -> Tensor:
            slope = recent("recent_products", (dz * z).mean(every))
            return (dz - z * along(slope, z)) / along(square + 1e-5, x) ** 0.5

        factor = torch.ones_like(square)
        if step > max(1000, warmup):
            factor = ((square + 1e-5) ** 0.5 / (kept + 1e-5) ** 0.5).clip(1 / 5, 5)
        buffers["steps"] = torch.tensor(step)
        follow(buffers, running_square=square)
        through = x - x.detach() + z
        through.register_hook(backward)
        return scaled(through * along(factor, x), parameters)

    return formula


def follow(buffers: Tensors, momentum: float = 0.1, **measured: Tensor) -> None:
    """Move what is kept towards what was measured, and count."""
    for name, new in measured.items():
        buffers[name] = (1 - momentum) * buffers[name] + momentum * new.detach()
    buffers["num_batches_tracked"] = buffers["num_batches_tracked"] + 1


def scaled(z: Tensor, parameters: Tensors) -> Tensor:
    """weight · z + bias, where there are such."""
    if "weight" in parameters:
        z = z * along(parameters["weight"], z)
    return z + along(parameters["bias"], z) if "bias" in parameters else z


def along(values: Tensor, x: Tensor) -> Tensor:
    """(C,) beside (N, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.ndim - 2))
