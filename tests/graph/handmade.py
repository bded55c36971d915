"""Norms that somebody wrote, and modules that are none, for tests of what is recognised."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Made(nn.Module):
    """Gain and offset under names of somebody's choice, of a shape of somebody's choice."""

    def __init__(
        self,
        size: int = 12,
        *,
        gain: str = "weight",
        offset: str = "",
        shape: tuple[int, ...] = (-1,),
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.gain, self.offset = gain, offset
        if gain:
            self.register_parameter(gain, nn.Parameter(torch.ones(size).reshape(shape)))
        if offset:
            self.register_parameter(offset, nn.Parameter(torch.zeros(size).reshape(shape)))

    def affine(self, x: Tensor) -> Tensor:
        x = x * getattr(self, self.gain) if self.gain else x
        return x + getattr(self, self.offset) if self.offset else x


class LastRMS(Made):
    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class SingleRMS(Made):
    """In single precision whatever comes, as most."""

    def forward(self, hidden: Tensor) -> Tensor:
        kept = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.affine(hidden.to(kept))


class OnePlusRMS(Made):
    def _standardized(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self._standardized(x) * (1.0 + getattr(self, self.gain))


class LastLayer(Made):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return self.affine((x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, True) + self.eps))


class UnbiasedLayer(Made):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, keepdim=True)
        return self.affine((x - mean) * torch.rsqrt(var + self.eps))


class FirstLayer(Made):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.affine((x - mean) / torch.sqrt(var + self.eps))


class FirstRMS(Made):
    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt())


class Groups(Made):
    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(len(x), 3, -1)
        var, mean = torch.var_mean(parts, 2, correction=0, keepdim=True)
        return self.affine(((parts - mean) / (var + self.eps).sqrt()).reshape(x.shape))


class Instances(Made):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return self.affine((x - mean) / (var + self.eps).sqrt())


class WholeMaps(Made):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        return self.affine((x - mean) / (var + self.eps).sqrt())


class Batches(Made):
    """With statistics of its own, updated as most do."""

    def __init__(self, size: int = 12, **rest: Any) -> None:
        super().__init__(size, **rest)
        self.momentum = 0.1
        self.register_buffer("mean_so_far", torch.zeros(size))
        self.register_buffer("var_so_far", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean_so_far, self.var_so_far
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                self.mean_so_far.lerp_(mean, self.momentum)
                self.var_so_far.lerp_(var, self.momentum)
        x = (x - mean[:, None, None]) / (var + self.eps).sqrt()[:, None, None]
        return self.affine(x)


class HalfCast(nn.LayerNorm):
    """Casts its input to single precision, and relies on weights that are."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.normalized_shape
        return F.layer_norm(x.float(), size, self.weight, self.bias, self.eps).to(x.dtype)


class Frozen(nn.Module):
    """Buffers alone, as DETR has them; eps is a number in its code."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("scale", 1), ("shift", 0), ("centre", 0), ("spread", 1)):
            self.register_buffer(name, torch.full((12,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        slope = self.scale * (self.spread + 1e-5).rsqrt()
        offset = self.shift - self.centre * slope
        return x * slope[:, None, None] + offset[:, None, None]


class Formatted(nn.LayerNorm):
    """As of ConvNeXt: torch's, with the channels here or there."""

    def __init__(self, size: int = 12, *, first: bool = False) -> None:
        super().__init__(size, eps=1e-6)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


MAP = (-1, 1, 1)

#: Of each the norm that it is, and where its channels are.
NORMS: dict[str, tuple[Any, str, int]] = {
    "rms": (LastRMS, "rms", -1),
    "rms under other names": (lambda: LastRMS(gain="g", offset="b", eps=1e-6), "rms", -1),
    "rms without a gain": (lambda: LastRMS(gain="", offset="shift"), "rms", -1),
    "rms in single precision": (lambda: SingleRMS(gain="scale"), "rms", -1),
    "rms, one plus": (OnePlusRMS, "rms", -1),
    "rms, one plus, eps 0.1": (lambda: OnePlusRMS(gain="gamma", eps=0.1), "rms", -1),
    "rms of maps": (lambda: FirstRMS(shape=MAP, offset="bias"), "rms2d", 1),
    "layer norm": (lambda: LastLayer(offset="bias"), "ln", -1),
    "layer norm, no offset": (lambda: LastLayer(gain="alpha", eps=1e-12), "ln", -1),
    "layer norm, unbiased": (lambda: UnbiasedLayer(gain="a", offset="b"), "ln", -1),
    "layer norm of maps": (lambda: FirstLayer(gain="g", offset="b", shape=(1, *MAP)), "ln2d", 1),
    "layer norm of whole maps": (lambda: WholeMaps(offset="bias", shape=MAP), "ln", 1),
    "groups": (lambda: Groups(offset="beta", shape=MAP), "gn", 1),
    "instances": (lambda: Instances(offset="bias", shape=MAP), "in", 1),
    "batches": (lambda: Batches(offset="bias", shape=MAP), "bn", 1),
    "frozen": (Frozen, "frozen_bn", 1),
    "torch's, channels last": (Formatted, "ln", -1),
    "torch's, channels first": (lambda: Formatted(first=True), "ln2d", 1),
}


class Odd(Made):
    """No norm, and near one: what its function makes of an input, with gain and offset."""

    def __init__(self, function: Any, **rest: Any) -> None:
        super().__init__(**rest)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # .mean and .std are named, so that its code looks like a norm's
        return self.affine(self.function(self, x, torch.mean, torch.std))


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


#: Functions of the module and its input.
NEAR_MISSES: dict[str, Any] = {
    "nothing": lambda m, x, *_: x,
    "twice": lambda m, x, *_: 2 * x,
    "centred only": lambda m, x, *_: _centred(x),
    "scaled by the largest": lambda m, x, *_: x / x.abs().amax(-1, keepdim=True),
    "scaled by the sum": lambda m, x, *_: x / x.abs().sum(-1, keepdim=True),
    "of length 1": lambda m, x, *_: F.normalize(x, dim=-1),
    "eps outside of the root": lambda m, x, *_: _centred(x) / (x.std(-1, keepdim=True) + 1e-3),
    "by the deviation, not centred": lambda m, x, *_: x / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "centred, by the root mean square": lambda m, x, *_: (
        _centred(x) / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    ),
    "by the variance": lambda m, x, *_: _centred(x) / (x.var(-1, keepdim=True) + 1e-5),
    "by the cube root": lambda m, x, *_: x / (x.abs() ** 3).mean(-1, keepdim=True) ** (1 / 3),
    "by the mean deviation": lambda m, x, *_: (
        _centred(x) / (_centred(x).abs().mean(-1, keepdim=True) + 1e-5)
    ),
    "by the median": lambda m, x, *_: x - x.median(-1, keepdim=True).values,
    "multiplied by the root mean square": lambda m, x, *_: (
        x * x.square().mean(-1, keepdim=True).sqrt()
    ),
    "with what it was": lambda m, x, *_: x + LastRMS.forward(LastRMS(gain=""), x),
    "of half the channels": lambda m, x, *_: torch.cat(
        [LastRMS.forward(LastRMS(gain=""), x[..., :6]), x[..., 6:]], -1
    ),
    "rectified after": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x).relu(),
    "rectified before": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x.relu()),
    "squashed after": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x).tanh(),
    "softmax": lambda m, x, *_: x.softmax(-1),
    "log softmax": lambda m, x, *_: x.log_softmax(-1),
    "tanh": lambda m, x, *_: x.tanh(),
    "sorted": lambda m, x, *_: x.sort(-1).values,
    "shifted along": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x.roll(1, -1)),
    "summed up": lambda m, x, *_: x.cumsum(-1),
    "clipped": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x).clamp(-1, 1),
    "response, global": lambda m, x, *_: (
        x * x.norm(dim=1, keepdim=True) / (x.norm(dim=1, keepdim=True).mean(-1, True) + 1e-6)
    ),
    "of the eval mode only": lambda m, x, *_: (
        x if m.training else LastRMS.forward(LastRMS(gain=""), x)
    ),
    "of the train mode only": lambda m, x, *_: (
        LastRMS.forward(LastRMS(gain=""), x) if m.training else x
    ),
    "in half precision": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x.bfloat16()),
    "with noise": lambda m, x, *_: LastRMS.forward(LastRMS(gain=""), x) + 1e-4 * torch.randn(12),
    "nearly": lambda m, x, *_: 1.00001 * LastRMS.forward(LastRMS(gain=""), x),
    "gain at random": lambda m, x, *_: 1.5 * LastRMS.forward(LastRMS(gain=""), x),
}
