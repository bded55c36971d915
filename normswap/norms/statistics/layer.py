"""LayerNorm: over C at each position, or over one sample's (C, H, W).

Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv 1607.06450. Over C at each position of a
channels-first map: Liu et al., "A ConvNet for the 2020s", CVPR 2022, arXiv 2201.03545.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, ANY_SOURCE, EPS, MAP_SOURCES, NormEntry
from normswap.norms.pool import POSITION, Rule, per_group
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = [
    "ENTRIES",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormMap",
    "over_several",
    "read_layer_norm",
]


class LayerNorm(Norm, nn.LayerNorm):
    """`torch.nn.LayerNorm` over C at each position, wherever the channels are."""

    channel_dim = -1
    native_dim = -1

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (..., C) per position."""
        self.refuse_single_value(x.shape[-1], "use more channels")
        return super().normalize(x)


class LayerNorm2d(LayerNorm):
    """LayerNorm over C at each position of a channels-first map (N, C, ...)."""

    channel_dim = 1


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
        self.refuse_single_value(math.prod(x.shape[1:]), "use a larger map")
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
    size, new_eps = state.num_features, state.eps if eps is None else eps

    def on_tokens() -> nn.Module:
        if not state.tail:
            return nn.LayerNorm(size, eps=new_eps, elementwise_affine=False)
        return place(LayerNorm(size, eps=new_eps, elementwise_affine=False), state)

    def on_map() -> nn.Module:
        return place(LayerNormMap(size, eps=new_eps, affine=False), state)

    tokens = state.channel_dim != 1
    rule = Rule.always(POSITION if tokens else per_group(size))
    shell = on_tokens if tokens else on_map
    return begin(state, shell, rule, carry=carry, eps=eps, affine=affine)


def start_layer_norm_2d(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
) -> Start:
    """Start a LayerNorm per position, on maps as on tokens."""

    def shell() -> nn.Module:
        new_eps = state.eps if eps is None else eps
        return place(LayerNorm2d(state.num_features, eps=new_eps, elementwise_affine=False), state)

    return begin(state, shell, Rule.always(POSITION), carry=carry, eps=eps, affine=affine)


def over_several(shape: tuple[int, ...], weight: Tensor | None) -> str:
    """Why a norm over several dimensions cannot be carried to another family; empty for one."""
    if len(shape) == 1:
        return ""
    if weight is None:
        return f"it normalizes over {shape}, and nothing tells which of these are its channels"
    return f"it normalizes over {shape} with an affine of that shape, which is not per channel"


def read_layer_norm(module: nn.Module, *, norm: str = "ln", channel_dim: int = -1) -> NormState:
    """Read a LayerNorm over its last dimension, or one over C at ``channel_dim``."""
    if not isinstance(module, nn.LayerNorm):
        raise TypeError(f"expected a LayerNorm, got {type(module).__name__}")
    shape = tuple(module.normalized_shape)
    per_channel = len(shape) == 1
    given = tensors(module)
    return NormState(
        norm=norm,
        kind="layer_norm",
        num_features=shape[-1] if per_channel else shape[0],
        rule=Rule.always(POSITION if per_channel else per_group(shape[0])),
        eps=module.eps,
        obstacle=over_several(shape, given["weight"]),
        settings={"eps": module.eps, "affine": module.elementwise_affine},
        **given,
        **({"channel_dim": channel_dim if per_channel else 1} | layout(module)),
    )


def read_layer_norm_map(module: nn.Module) -> NormState:
    """Read a layer norm that is a GroupNorm of one group."""
    if not isinstance(module, nn.GroupNorm):
        raise TypeError(f"expected a GroupNorm, got {type(module).__name__}")
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


ENTRIES = (
    NormEntry(
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
    ),
    NormEntry(
        name="ln2d",
        aliases=("layer_norm_2d", "layernorm2d", "layer_norm2d"),
        kind="layer_norm",
        axis="statistics",
        pooled="C at a position of a map",
        paper="Liu et al. 2022, arXiv 2201.03545",
        sources=MAP_SOURCES | {"layer_norm"},
        start=start_layer_norm_2d,
        reads={LayerNorm2d: partial(read_layer_norm, norm="ln2d")},
        options=(EPS, AFFINE),
    ),
)
