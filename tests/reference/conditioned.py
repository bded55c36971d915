"""Formulas of norms that take an extra input.

Plain float64 arithmetic, sample by sample and position by position where that is how it is said:
``formula(x, parameters, buffers, training, **inputs) -> y`` for inputs (N, C, ...) and tensors by
name; it puts new tensors into ``buffers`` where the norm updates its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.beyond import Tensors, along, follow

EPS = 1e-5

#: ``standard(x, buffers, training) -> z``.
Standard = Callable[[Tensor, Tensors, bool], Tensor]
Formula = Callable[..., Tensor]


# -- what standardizes ----------------------------------------------------------------------------


def over_batch(x: Tensor, buffers: Tensors, training: bool) -> Tensor:
    """Ioffe and Szegedy 2015."""
    rows = x.movedim(1, 0).reshape(x.shape[1], -1)
    if training:
        mean, var = measured(rows)
        unbiased = var * rows.shape[1] / (rows.shape[1] - 1)
        follow(buffers, running_mean=mean, running_var=unbiased)
    else:
        mean, var = buffers["running_mean"], buffers["running_var"]
    return (x - along(mean, x)) / along((var + EPS) ** 0.5, x)


def over_groups(groups: int) -> Standard:
    """Wu and He 2018; of as many groups as channels Ulyanov et al. 2016, of one Ba et al. 2016."""

    def standard(x: Tensor, buffers: Tensors, training: bool) -> Tensor:
        rows = x.reshape(len(x) * groups, -1)
        mean, var = measured(rows)
        return ((rows - mean[:, None]) / (var[:, None] + EPS) ** 0.5).reshape(x.shape)

    return standard


def over_parts(size: int) -> Standard:
    """Hoffer et al. 2017, for batches of whole parts."""

    def standard(x: Tensor, buffers: Tensors, training: bool) -> Tensor:
        if not training:
            return over_batch(x, buffers, False)
        made, means, variances = [], [], []
        for part in x.split(size):
            rows = part.movedim(1, 0).reshape(x.shape[1], -1)
            mean, var = measured(rows)
            means.append(mean)
            variances.append(var * rows.shape[1] / (rows.shape[1] - 1))
            made.append((part - along(mean, x)) / along((var + EPS) ** 0.5, x))
        mean, var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
        follow(buffers, running_mean=mean, running_var=var)
        return torch.cat(made)

    return standard


def measured(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every row."""
    mean = rows.sum(1) / rows.shape[1]
    return mean, ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]


# -- by sample ------------------------------------------------------------------------------------


def by_class(standard: Standard) -> Formula:
    """De Vries et al. 2017 and Dumoulin et al. 2017, with tables; rows may be mixed."""

    def formula(
        x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, label: Any
    ) -> Tensor:
        z = standard(x, buffers, training)
        made = []
        for n in range(len(x)):
            gain, offset = parameters["weight"], parameters["bias"]
            for k, (of_gain, of_offset) in enumerate(
                zip(parameters["class_weight_delta"], parameters["class_bias_delta"], strict=True)
            ):
                share = share_of(label, n, k)
                gain, offset = gain + share * of_gain, offset + share * of_offset
            made.append(on_sample(z[n], gain, offset))
        return torch.stack(made)

    return formula


def by_embedding(standard: Standard) -> Formula:
    """De Vries et al. 2017, with a network of one hidden layer for gain and one for offset."""

    def formula(
        x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, condition: Tensor
    ) -> Tensor:
        def told(name: str, given: Tensor) -> Tensor:
            hidden = parameters[f"{name}_net.0.weight"] @ given + parameters[f"{name}_net.0.bias"]
            return parameters[f"{name}_net.2.weight"] @ torch.where(hidden > 0, hidden, 0)

        z = standard(x, buffers, training)
        gains = [parameters["weight"] + told("weight", given) for given in condition]
        offsets = [parameters["bias"] + told("bias", given) for given in condition]
        return torch.stack(list(map(on_sample, z, gains, offsets)))

    return formula


def by_style_vector(
    x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, style: Tensor
) -> Tensor:
    """Huang et al. 2018, as a difference to weight and bias."""
    z, channels = over_groups(x.shape[1])(x, buffers, training), x.shape[1]
    made = []
    for n, given in enumerate(style):
        told = parameters["style_linear.weight"] @ given + parameters["style_linear.bias"]
        gain, offset = parameters["weight"] + told[:channels], parameters["bias"] + told[channels:]
        made.append(on_sample(z[n], gain, offset))
    return torch.stack(made)


def by_style_features(content: Tensor, style: Tensor, *, unbiased: bool = False) -> Tensor:
    """Huang and Belongie 2017: the style's mean and deviation for the content's."""
    rows, others = content.flatten(2), style.flatten(2)
    correction = int(unbiased)
    deviation = (rows.var(2, correction=correction) + EPS) ** 0.5
    wanted = (others.var(2, correction=correction) + (EPS if unbiased else 0)) ** 0.5
    z = (rows - rows.mean(2, keepdim=True)) / deviation[..., None]
    return (z * wanted[..., None] + others.mean(2, keepdim=True)).reshape(content.shape)


def by_domain(
    x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, domain: Any = 0
) -> Tensor:
    """Chang et al. 2019: every domain's samples as one batch of their own."""
    ids = torch.full((len(x),), domain) if isinstance(domain, int) else domain
    y, count = torch.empty_like(x), len(buffers["other_running_mean"]) + 1
    for d in range(count):
        here = ids == d
        if not here.any():
            continue
        kept = of_domain(buffers, d)
        z = over_batch(x[here], kept, training)
        into_domain(buffers, d, kept)
        gain, offset = parameters["weight"], parameters["bias"]
        if "domain_weight_delta" in parameters:
            gain = gain + parameters["domain_weight_delta"][d]
            offset = offset + parameters["domain_bias_delta"][d]
        y = y.masked_scatter(
            here.reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape),
            z * along(gain, x) + along(offset, x),
        )
    return y


def by_split(
    x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, labelled: Any = None
) -> Tensor:
    """Zając et al. 2019: two domains in training, the labelled one's statistics in eval."""
    ids = torch.zeros(len(x), dtype=torch.long)
    if labelled is not None and training:
        ids = torch.where(labelled.bool(), 0, 1)
    return by_domain(x, parameters, buffers, training, domain=ids)


def of_domain(buffers: Tensors, d: int) -> Tensors:
    """What is kept of a domain, under a batch norm's names."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffers[name] if d == 0 else buffers[f"other_{name}"][d - 1] for name in names}


def into_domain(buffers: Tensors, d: int, kept: Tensors) -> None:
    """Put back what `of_domain` took out."""
    for name, value in kept.items():
        if d == 0:
            buffers[name] = value
        else:
            buffers[f"other_{name}"] = buffers[f"other_{name}"].clone()
            buffers[f"other_{name}"][d - 1] = value


def share_of(label: Any, n: int, k: int) -> Any:
    """How much of row k sample n has."""
    if isinstance(label, int):
        return float(label == k)
    return label[n, k] if label.ndim == 2 else float(label[n] == k)


def on_sample(z: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """One sample (C, ...) with its own gain and offset (C,)."""
    shape = (-1, *[1] * (z.ndim - 1))
    return z * gain.reshape(shape) + offset.reshape(shape)


# -- by position ----------------------------------------------------------------------------------


def by_label_map(standard: Standard) -> Formula:
    """Park et al. 2019, as a difference to weight and bias."""

    def formula(
        x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, segmap: Tensor
    ) -> Tensor:
        z = standard(x, buffers, training)
        gain, offset = of_labels(x, parameters, segmap)
        gain, offset = along(parameters["weight"], x) + gain, along(parameters["bias"], x) + offset
        return z * gain + offset

    return formula


def of_labels(x: Tensor, parameters: Tensors, segmap: Tensor) -> tuple[Tensor, Tensor]:
    """What SPADE's convolutions predict."""
    labels = nearest(one_hot(segmap, parameters["label_conv.weight"].shape[1], x.ndim), x)
    hidden = convolved(labels, parameters, "label_conv")
    hidden = torch.where(hidden > 0, hidden, 0)
    return convolved(hidden, parameters, "gain_conv"), convolved(hidden, parameters, "offset_conv")


def by_region_style(standard: Standard) -> Formula:
    """Zhu et al. 2020: every pixel looks up the code of its region."""

    def formula(
        x: Tensor,
        parameters: Tensors,
        buffers: Tensors,
        training: bool,
        *,
        segmap: Tensor,
        style: Tensor,
    ) -> Tensor:
        noise = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype)
        z = standard(x + along(parameters["noise_weight"], x) * noise, buffers, training)
        regions = parameters["style_weight"].shape[0]
        labels = nearest(one_hot(segmap, regions, x.ndim), x)
        laid = [torch.zeros(style.shape[2], *x.shape[2:], dtype=x.dtype) for _ in x]
        for n in range(len(x)):
            for j in range(regions):  # so that the highest comes last
                code = parameters["style_weight"][j] @ style[n, j] + parameters["style_bias"][j]
                code = torch.where(code > 0, code, 0).reshape(-1, *[1] * (x.ndim - 2))
                laid[n] = torch.where(labels[n, j] != 0, code, laid[n])
        made = []
        for name, of_map in zip(("gain", "offset"), of_labels(x, parameters, segmap), strict=True):
            share = 1 / (1 + (-parameters[f"{name}_blend"]).exp())
            of_style = convolved(torch.stack(laid), parameters, f"style_{name}_conv")
            made.append(share * of_style + (1 - share) * of_map)
        return (
            z * (along(parameters["weight"], x) + made[0]) + along(parameters["bias"], x) + made[1]
        )

    return formula


def by_mask(
    *, per_sample: bool = False, eps_scaled: bool = True, official_bias: bool = False
) -> Formula:
    """Yu et al. 2020, RN-B: the values of every region gathered and standardized by themselves."""

    def formula(
        x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, mask: Tensor
    ) -> Tensor:
        inside = nearest(mask.to(x.dtype), x)[:, 0] == 1
        y = torch.zeros_like(x)
        for n, c in itertools.product(range(len(x)), range(x.shape[1])):
            for region, name in ((inside, "inside"), (~inside, "outside")):
                chosen = region[n] if per_sample else region
                values = (x[n, c] if per_sample else x[:, c])[chosen]
                if not region[n].any():
                    continue
                mean = values.sum() / len(values)
                var = ((values - mean) ** 2).sum() / len(values)
                eps = EPS * chosen.numel() / len(values) if eps_scaled else EPS
                z = (x[n, c] - mean) / (var + eps) ** 0.5
                gain = parameters["weight"][c] + parameters[f"{name}_weight"][c]
                y[n, c] = y[n, c] + torch.where(region[n], z * gain, 0)
                if not official_bias:
                    y[n, c] = y[n, c] + region[n] * parameters[f"{name}_bias"][c]
            y[n, c] = y[n, c] + parameters["bias"][c]
            if official_bias:
                y[n, c] = y[n, c] + parameters["inside_bias"][c] + parameters["outside_bias"][c]
        return y

    return formula


def by_filters(kernel_size: int) -> Formula:
    """Cho et al. 2019: every window cut out, then a filter for each sample's channel."""

    def formula(
        x: Tensor, parameters: Tensors, buffers: Tensors, training: bool, *, style: Tensor
    ) -> Tensor:
        half, z = kernel_size // 2, torch.zeros_like(x)
        for place in itertools.product(*map(range, x.shape[2:])):
            cut = tuple(slice(max(0, at - half), at + half + 1) for at in place)
            inside = x[(slice(None), slice(None), *cut)].flatten(2)
            mean = inside.sum(2) / inside.shape[2]
            var = ((inside - mean[..., None]) ** 2).sum(2) / inside.shape[2]
            here = (slice(None), slice(None), *place)
            z[here] = (x[here] - mean) / (var + EPS) ** 0.5
        made = []
        for n, given in enumerate(style):
            told = parameters["filter_linear.weight"] @ given + parameters["filter_linear.bias"]
            kernels = told.reshape(x.shape[1], -1)
            kernels = torch.stack(
                [
                    kernel + (at == kernels.shape[1] // 2) * parameters["weight"]
                    for at, kernel in enumerate(kernels.unbind(1))
                ],
                1,
            ).reshape(x.shape[1], *[kernel_size] * (x.ndim - 2))
            offset = parameters["offset_linear.weight"] @ given + parameters["offset_linear.bias"]
            offset = offset + parameters["bias"]
            channels = [
                window_sums(z[n : n + 1, c : c + 1], kernels[c][None, None])[0, 0] + offset[c]
                for c in range(x.shape[1])
            ]
            made.append(torch.stack(channels))
        return torch.stack(made)

    return formula


def one_hot(segmap: Tensor, labels: int, ndim: int) -> Tensor:
    """(N, K, ...) of labels (N, ...), or what it is already."""
    if segmap.ndim == ndim and segmap.is_floating_point():
        return segmap
    return torch.stack([segmap == label for label in range(labels)], 1).double()


def nearest(values: Tensor, x: Tensor) -> Tensor:
    """(N, K, ...) in the size of x: at i of n what was at floor(i · m / n) of m."""
    for dim, size in enumerate(x.shape[2:], start=2):
        index = [at * values.shape[dim] // size for at in range(size)]
        values = values.index_select(dim, torch.tensor(index))
    return values


def convolved(x: Tensor, parameters: Tensors, name: str) -> Tensor:
    """A convolution that keeps the size."""
    y = window_sums(x, parameters[f"{name}.weight"])
    return y + along(parameters[f"{name}.bias"], y)


def window_sums(x: Tensor, kernel: Tensor) -> Tensor:
    """Σ over channels and offsets of kernel (out, in, ...) times shifted x, zero beyond it."""
    sizes = kernel.shape[2:]
    padded = torch.nn.functional.pad(x, [s // 2 for s in reversed(sizes) for _ in range(2)])
    y = torch.zeros(len(x), len(kernel), *x.shape[2:], dtype=x.dtype)
    for offset in itertools.product(*map(range, sizes)):
        cut = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[2:], strict=True))
        part = padded[(slice(None), slice(None), *cut)]
        y = y + torch.einsum("ni...,oi->no...", part, kernel[(slice(None), slice(None), *offset)])
    return y
