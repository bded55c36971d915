"""A module that is asked by inputs what it does: a copy with numbers of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normswap.graph.standardizing import Layout

__all__ = ["Subject"]


class Subject:
    """A copy of a module that can be run on anything, with numbers of its own as tensors.

    Args:
        module: the module.
        dtype: what it is run in; what it is asked and what it answers is in double precision.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._draw = torch.Generator().manual_seed(0)
        memo = {
            id(tensor): self._drawn(tensor) for tensor in (*module.parameters(), *module.buffers())
        }
        self.module = copy.deepcopy(module, memo)
        for name, value in vars(nn.Module()).items():
            if "hook" in name:
                vars(self.module)[name] = type(value)() if value is not None else None
        self.parameters = self._of_channels(self.module._parameters)
        self.buffers = self._of_channels(self.module._buffers)

    @property
    def channels(self) -> int:
        """C, of its tensors or of what it says of itself; 0 if nothing tells."""
        for tensor in (*self.parameters.values(), *self.buffers.values()):
            return tensor.numel()
        for name in ("normalized_shape", "num_features", "num_channels", "hidden_size", "dim"):
            told = vars(self.module).get(name)
            told = told[0] if isinstance(told, (tuple, list)) and len(told) == 1 else told
            if isinstance(told, int) and not isinstance(told, bool) and told > 1:
                return told
        return 0

    def inputs(self, shape: tuple[int, ...]) -> Tensor:
        """Fresh numbers, which its precision has."""
        drawn = torch.randn(shape, generator=self._draw, dtype=torch.float64)
        return drawn.to(self._dtype).double()

    def run(self, x: Tensor, *, training: bool = False) -> Tensor:
        """What it makes of an input; what it keeps of it is forgotten again."""
        buffers = self.module._buffers.items()
        kept = {name: value.clone() for name, value in buffers if value is not None}
        self.module.train(training)
        try:
            # Not called as a module: a tracer, if one is at work, would take that for the model's.
            y: object = self.module.forward(x.to(self._dtype, copy=True))
        finally:
            self.module._buffers.update(kept)
            self.buffers = self._of_channels(self.module._buffers)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise ValueError("its output is of another shape")
        return y.double()

    def takes(self, layout: Layout) -> bool:
        """Whether it can be run on inputs of a layout."""
        try:
            return bool(self.run(self.inputs(layout.shape), training=True).isfinite().all())
        except Exception:
            return False

    def _drawn(self, tensor: Tensor) -> Tensor:
        """Numbers in a tensor's place: from 0.5 to 1.5, so that they are no variances below 0."""
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=self._draw, dtype=torch.float64) + 0.5
            drawn = drawn.to(self._dtype)
        else:
            drawn = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return nn.Parameter(drawn) if isinstance(tensor, nn.Parameter) else drawn

    def _of_channels(self, held: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        return {
            name: tensor.detach().double().flatten()
            for name, tensor in held.items()
            if tensor is not None and tensor.is_floating_point() and tensor.numel() > 1
        }
