"""Layers that multiply every channel by a parameter of their own (LayerScale), by what they do."""

from __future__ import annotations

import torch
from torch import nn

from normswap.graph.subject import Subject

__all__ = ["scale_of"]


def scale_of(module: nn.Module, size: int, dim: int, ndim: int) -> str:
    """The name of the parameter that a layer multiplies channels by, if it does nothing else.

    Args:
        module: the layer.
        size: how many channels there are.
        dim: which dimension of its input they are.
        ndim: how many dimensions that has.

    Returns:
        The name, or nothing.
    """
    own = [*module.parameters(), *module.buffers()]
    if [each.numel() for each in own] != [size] or len(module._parameters) != 1:
        return ""
    subject = Subject(module, torch.float64)
    shape, beside = [2, 3, 4, 5, 6][:ndim], [1] * ndim
    shape[dim], beside[dim] = size, -1
    x = subject.inputs(tuple(shape))
    for name, values in subject.parameters.items():
        try:
            made = [subject.run(x, training=training) for training in (False, True)]
        except Exception:  # it takes no such input
            return ""
        expected = x * values.view(beside)
        if all(torch.allclose(y, expected, rtol=1e-6, atol=0) for y in made):
            return name
    return ""
