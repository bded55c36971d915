"""Calibration from its definition: plain forwards, one norm after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Any], Any]


def simply(model: nn.Module, batch: Any) -> Any:
    """Call the model on the batch."""
    return model(batch)


def columns(x: Tensor, channel_dim: int) -> Tensor:
    """All values of each channel, (C, values)."""
    return x.movedim(channel_dim, 0).flatten(1)


def least_squares(z: Tensor, y: Tensor, *, offset: bool = True) -> tuple[Tensor, Tensor]:
    """For each row the gain and offset that bring z nearest to y, by `torch.linalg.lstsq`."""
    one = torch.ones_like(z) if offset else torch.zeros_like(z)
    found = torch.linalg.lstsq(torch.stack([z, one], -1), y[..., None], driver="gelsd").solution
    return found[:, 0, 0], found[:, 1, 0]


def equal_moments(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the positive gain and the offset that give z the mean and variance of y."""
    gain = y.std(1, correction=0) / z.std(1, correction=0)
    return gain, y.mean(1) - gain * z.mean(1)


def outputs(
    model: nn.Module, path: str, batches: Sequence[Any], channel_dim: int, run: Run
) -> Tensor:
    """What a norm returns for all batches in eval mode, (C, values)."""
    seen: list[Tensor] = []
    # At once, since what comes next may overwrite it.
    keep = lambda module, args, y: seen.append(columns(y, channel_dim).clone())  # noqa: E731
    handle = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    handle.remove()
    return torch.cat(seen, 1)


def fit_one_by_one(
    model: nn.Module,
    original: nn.Module,
    paths: Sequence[str],
    batches: Sequence[Any],
    *,
    channel_dim: int = 1,
    fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = least_squares,
    run: Run = simply,
) -> None:
    """Fit the norms of a converted model in the order given, which is that of their calls."""
    for path in paths:
        norm: Any = model.get_submodule(path)
        with torch.no_grad():
            norm.weight.fill_(1)
            if norm.bias is not None:
                norm.bias.zero_()
        z = outputs(model, path, batches, channel_dim, run)
        gain, offset = fit(z, outputs(original, path, batches, channel_dim, run))
        with torch.no_grad():
            norm.weight.copy_(gain)
            if norm.bias is not None:
                norm.bias.copy_(offset)


def relative_error(y: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float((y - wanted).norm() / wanted.norm())
