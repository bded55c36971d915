"""The four passes over a map that all norms of per-channel statistics are made of.

Each takes (N, C, *) and (N, C): mean and variance of every sample's channel, y = gain·x + offset,
the two sums that backward needs, and dx = gain·dy + slope·x + shift. There are four ways to do
them, of the same names in a module each, and where the map is and how it lies in memory decides:

- `rows` on the processor, where the positions of a channel lie together (contiguous),
- `columns` on the processor, where the channels of a position do (channels last),
- `launch` for both of these on CUDA and ROCm, where Triton is installed, as it is with torch's
  builds for them,
- `plain` for all else, in plain torch operations: slower, to the same precision.

Statistics are float32, or float64 for a float64 input, and never E[x²] - E[x]² of raw data.
"""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from normswap.norms.passes import columns, plain, rows
from normswap.norms.passes.shapes import beside, layout, matching, work_dtype

__all__ = ["beside", "channel_sums", "combined", "matching", "moments", "scaled", "work_dtype"]

#: Rows shorter than this are no gain over plain operations on the processor.
SHORT_ROW = 16

#: What Triton computes with, and the compute capability of Nvidia's devices that it takes.
CAPABILITY = {
    torch.float64: (7, 0),
    torch.float32: (7, 0),
    torch.float16: (7, 0),
    torch.bfloat16: (8, 0),
}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions of every sample's channel, two tensors (N, C).

    Both are 0 where there are no positions.

    Args:
        x: (N, C, *), floating point.
    """
    if x.numel() == 0:
        none = x.new_zeros(x.shape[:2], dtype=work_dtype(x))
        return none, none.clone()
    return _way(x).moments(x)


def scaled(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain·x + offset, in the dtype and memory format of x.

    Args:
        x: (N, C, *).
        gain: (N, C), of `work_dtype`.
        offset: (N, C), likewise.
    """
    return _way(x).scaled(x, gain, offset)


def channel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dy·(x - mean) and Σ dy over the positions, two tensors (N, C) of `work_dtype`.

    Args:
        dy: (N, C, *), of the dtype of x.
        x: (N, C, *).
        mean: (N, C), of `work_dtype`.
    """
    return _way(x).channel_sums(dy, x, mean)


def combined(dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """gain·dy + slope·x + shift, in the dtype and memory format of x.

    Args:
        dy: (N, C, *), of the dtype of x.
        x: (N, C, *).
        gain: (N, C), of `work_dtype`, as are the next two.
        slope: (N, C).
        shift: (N, C).
    """
    return _way(x).combined(dy, x, gain, slope, shift)


class _Way(Protocol):
    """What a module of the passes has."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def scaled(self, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor: ...

    def channel_sums(self, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]: ...

    def combined(
        self, dy: Tensor, x: Tensor, gain: Tensor, slope: Tensor, shift: Tensor
    ) -> Tensor: ...


def _way(x: Tensor) -> _Way:
    lying = layout(x)
    if not lying or x.numel() == 0:
        return plain
    if x.device.type == "cpu" and math.prod(x.shape[2:]) >= SHORT_ROW:
        return rows if lying == "rows" else columns
    if x.device.type == "cuda" and _compiles(x.device, x.dtype) and not _is_watched(x):
        from normswap.norms.passes import launch

        return launch
    return plain


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is there and makes programs for a device and a dtype."""
    if find_spec("triton") is None or dtype not in CAPABILITY:
        return False
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= CAPABILITY[dtype]


def _is_watched(x: Tensor) -> bool:
    """Whether something wants to see torch operations: a fake tensor, or a mode that records."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0
