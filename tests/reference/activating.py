"""Formulas of norms that go with an activation, as in `tests.reference.beyond`."""

from __future__ import annotations

from torch import Tensor

from tests.reference.beyond import Formula, Tensors, along, follow, scaled


def filter_response_norm(
    x: Tensor, parameters: Tensors, buffers: Tensors, training: bool
) -> Tensor:
    """Singh and Krishnan 2020: by the root mean square of a channel, with a learned eps if any."""
    rows = x.reshape(*x.shape[:2], -1)
    square = (rows * rows).sum(2) / rows.shape[2]
    eps = 1e-5 + parameters["extra_eps"].abs() if "extra_eps" in parameters else 1e-5
    root = (square + eps) ** 0.5
    return scaled((rows / root[:, :, None]).reshape(x.shape), parameters)


def evonorm_b0(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Liu et al. 2020: by the larger of the batch's deviation and the instance's with a slope."""
    rows = x.reshape(*x.shape[:2], -1)
    away = rows - rows.sum(2, keepdim=True) / rows.shape[2]
    own = ((away * away).sum(2, keepdim=True) / rows.shape[2] + 1e-5) ** 0.5
    if training:
        values = x.movedim(1, 0).reshape(x.shape[1], -1)
        far = values - values.sum(1, keepdim=True) / values.shape[1]
        var = (far * far).sum(1) / values.shape[1]
        follow(buffers, running_var=var)
    else:
        var = buffers["running_var"]
    slope = along(parameters["v"], rows) * rows + own
    batch = along((var + 1e-5) ** 0.5, rows).expand_as(slope)
    larger = (slope + batch + (slope - batch).abs()) / 2
    return scaled((rows / larger).reshape(x.shape), parameters)


def evonorm_s0(groups: int) -> Formula:
    """Liu et al. 2020: a swish over the deviation of a sample's group."""

    def formula(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
        rows = x.reshape(len(x), groups, -1)
        away = rows - rows.sum(2, keepdim=True) / rows.shape[2]
        var = (away * away).sum(2, keepdim=True) / rows.shape[2]
        root = ((var + 1e-5) ** 0.5).expand_as(rows).reshape(x.shape)
        swish = x / (1 + (-along(parameters["v"], x) * x).exp())
        return scaled(swish / root, parameters)

    return formula


def straight(x: Tensor, parameters: Tensors, buffers: Tensors, training: bool) -> Tensor:
    """Gain and offset alone."""
    return scaled(x, parameters)
