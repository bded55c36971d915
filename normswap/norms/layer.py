"""LayerNorm: torch's on token layouts, over one sample's (C, H, W) on feature maps.

Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv 1607.06450.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, EPS, NormEntry
from normswap.norms.pool import POSITION, Pool, Rule, per_group
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRY", "LayerNorm", "LayerNormMap"]

ANY_SOURCE = frozenset(
    {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "identity"}
)


class LayerNorm(Norm, nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, with normswap's tail."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C) per position; channels are where torch wants them already."""
        y = nn.LayerNorm.forward(self, x)
        for name in self.tail:
            y = getattr(self, name)(y)
        return y


class LayerNormMap(Norm, nn.GroupNorm):
    """Layer normalization of a feature map: over one sample's (C, H, W), affine per channel.

    Args:
        num_features: C.
        eps: added to the variance. Default 1e-5.
        affine: whether there are weight and bias, (C,). Default yes.

    Raises:
        DegeneratePooling: at a forward where a sample holds a single value.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(1, num_features, eps=eps, affine=affine)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) per sample."""
        self.refuse_single_value(math.prod(x.shape[1:]))
        return super().normalize(x)

    def extra_repr(self) -> str:
        """Say size and eps; there are no groups to speak of."""
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"


def start_layer_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a LayerNorm: per position on tokens, per sample on channels-first maps."""
    size = state.num_features
    new_eps = state.eps if eps is None else eps

    def on_tokens() -> nn.Module:
        if not state.tail:
            return nn.LayerNorm(size, eps=new_eps, elementwise_affine=False)
        return place(LayerNorm(size, eps=new_eps, elementwise_affine=False), state)

    def on_map() -> nn.Module:
        return place(LayerNormMap(size, eps=new_eps, affine=False), state)

    tokens = state.channel_dim != 1
    pool: Pool = POSITION if tokens else per_group(size)
    shell = on_tokens if tokens else on_map
    return begin(state, shell, Rule.always(pool), carry=carry, eps=eps, affine=affine)


def read_layer_norm(module: nn.Module) -> NormState:
    """Read torch's LayerNorm, over its last dimension."""
    if not isinstance(module, nn.LayerNorm):
        raise TypeError(f"expected a LayerNorm, got {type(module).__name__}")
    shape = tuple(module.normalized_shape)
    per_channel = len(shape) == 1
    return NormState(
        norm="ln",
        kind="layer_norm",
        num_features=shape[-1] if per_channel else shape[0],
        rule=Rule.always(POSITION if per_channel else per_group(shape[0])),
        eps=module.eps,
        obstacle="" if per_channel else f"it normalizes over {shape} with an affine of that shape",
        settings={"eps": module.eps, "affine": module.elementwise_affine},
        **tensors(module),
        channel_dim=-1 if per_channel else 1,
        tail=getattr(module, "tail", ()),
    )


def read_layer_norm_map(module: nn.Module) -> NormState:
    """Read a LayerNormMap."""
    if not isinstance(module, LayerNormMap):
        raise TypeError(f"expected a LayerNormMap, got {type(module).__name__}")
    return NormState(
        norm="ln",
        kind="layer_norm",
        num_features=module.num_channels,
        rule=Rule.always(per_group(module.num_channels)),
        eps=module.eps,
        settings={"eps": module.eps, "affine": module.affine},
        **tensors(module),
        **layout(module),
    )


ENTRY = NormEntry(
    name="ln",
    aliases=("layer_norm", "layernorm"),
    kind="layer_norm",
    axis="statistics",
    pooled="C at a position (tokens); C × H·W, per sample (maps)",
    paper="Ba et al. 2016, arXiv 1607.06450",
    sources=ANY_SOURCE,
    start=start_layer_norm,
    reads={
        nn.LayerNorm: read_layer_norm,
        LayerNorm: read_layer_norm,
        LayerNormMap: read_layer_norm_map,
    },
    options=(EPS, AFFINE),
)
