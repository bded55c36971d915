"""Collecting what a style has at each place of a network where a norm takes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from normswap.errors import InputError
from normswap.norms.affine.style import AdaptiveInstanceNorm, Collected
from normswap.swap.inputs import inputs

__all__ = ["style_features"]


def style_features(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a style through a network, and keep mean and deviation of it at every ``adain``.

    It goes through the network as it is without a style. Gradients flow as in any forward.

    Args:
        model: a model that was converted to ``"adain"`` without a ``style_dim=``.
        *args: what the model is called with, such as images of the style; of as many samples as
            the content will have, or of one.
        **kwargs: likewise.

    Returns:
        What the model takes as ``style=``: by the norm's path mean and standard deviation of every
        sample's channel, (N, C) each.

    Raises:
        InputError: no norm of the model takes features of a style.
    """
    takers = [
        norm
        for norm in model.modules()
        if isinstance(norm, AdaptiveInstanceNorm) and norm.style_dim is None
    ]
    if not takers:
        takes = ", ".join(inputs(model)) or "no extra input"
        raise InputError(
            f"no norm of the model takes features of a style; its norms take {takes}: "
            'normswap.convert(model, to="adain") makes some that do'
        )
    collected = Collected()
    model(*args, **kwargs, style=collected)
    return collected.features
