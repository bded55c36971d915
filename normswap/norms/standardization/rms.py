"""RMSNorm: divides by the root mean square, over C at each position or one sample's (C, H, W).

Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv 1910.07467. The
form is torch's: x / sqrt(mean(x²) + eps), with eps inside the root.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.base import Norm, place
from normswap.norms.entry import AFFINE, EPS, MAP_SOURCES, NormEntry, flag
from normswap.norms.fidelity import Fidelity
from normswap.norms.pool import POSITION, Pool, Rule, per_group
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState
from normswap.norms.statistics.layer import over_several

__all__ = ["ENTRIES", "RMSNorm", "RMSNorm2d", "RMSNormMap", "default_eps", "read_rms_norm"]

_POSITION = Pool("position", centred=False)

EXACT = flag(
    "exact",
    None,
    "keep the function: take the mean out of all that writes to the stream; needs example_inputs",
    needs="stream",
)


class RMSNorm(Norm, nn.RMSNorm):
    """`torch.nn.RMSNorm` over C at each position, wherever the channels are, with an offset.

    A start from a norm that subtracts the mean needs the offset; without one it is torch's.
    """

    channel_dim = -1
    native_dim = -1
    bias: nn.Parameter | None

    def __init__(
        self, num_features: int, eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        super().__init__(num_features, eps=eps, elementwise_affine=elementwise_affine)
        self.register_parameter("bias", None)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (..., C) per position."""
        self.refuse_single_value(x.shape[-1], "use more channels")
        y = super().normalize(x)
        return y if self.bias is None else y + self.bias


class RMSNorm2d(RMSNorm):
    """RMSNorm over C at each position of a channels-first map (N, C, ...)."""

    channel_dim = 1


class RMSNormMap(Norm):
    """RMS normalization of a feature map: over one sample's (C, H, W), affine per channel.

    Args:
        num_features: C.
        eps: added to the mean square. Default 1e-6.

    Raises:
        DegeneratePooling: at a forward where a sample holds a single value.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) per sample, in single precision at least."""
        self.refuse_single_value(math.prod(x.shape[1:]), "use a larger map")
        values = x.reshape(x.shape[0], self.num_features, -1)
        values = values.to(torch.promote_types(x.dtype, torch.float32))
        square = values.square().mean((1, 2), keepdim=True)
        y = (values * (square + self.eps).rsqrt()).to(x.dtype)
        if self.weight is not None:
            y = y * self.weight.view(1, -1, 1)
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        """Say size and eps."""
        return f"{self.num_features}, eps={self.eps}"


def start_rms_norm(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
    exact: bool | None = None,
) -> Start:
    """Start an RMSNorm: per position on tokens, per sample on channels-first maps."""
    size = state.num_features
    new_eps = _eps_of(state) if eps is None else eps
    tokens = state.channel_dim != 1
    # torch's own has no offset: it will do where the source has none to carry or to make.
    gains_affine = not state.affine and (affine or not state.kind or state.kind == "identity")
    takes_offset = state.bias is not None or state.tracks or gains_affine
    plain = tokens and not state.tail and not takes_offset

    def shell() -> nn.Module:
        if plain:
            return nn.RMSNorm(size, eps=new_eps, elementwise_affine=False)
        if tokens:
            return place(RMSNorm(size, eps=new_eps, elementwise_affine=False), state)
        return place(RMSNormMap(size, eps=state.eps if eps is None else eps), state)

    rule = Rule.always(_POSITION if tokens else per_group(size, centred=False))
    start = begin(state, shell, rule, carry=carry, eps=eps, affine=affine)
    return _on_centred(state, start, rule, new_eps) if exact and carry == "auto" else start


def start_rms_norm_2d(
    state: NormState,
    *,
    carry: Carry = "auto",
    eps: float | None = None,
    affine: bool | None = None,
    exact: bool | None = None,
) -> Start:
    """Start an RMSNorm per position, on maps as on tokens."""

    def shell() -> nn.Module:
        new_eps = _eps_of(state) if eps is None else eps
        return place(RMSNorm2d(state.num_features, eps=new_eps, elementwise_affine=False), state)

    rule = Rule.always(_POSITION)
    start = begin(state, shell, rule, carry=carry, eps=eps, affine=affine)
    new_eps = _eps_of(state) if eps is None else eps
    return _on_centred(state, start, rule, new_eps) if exact and carry == "auto" else start


def _on_centred(state: NormState, start: Start, rule: Rule, eps: float | None) -> Start:
    """The same start on a residual stream whose mean over channels is 0, where it is exact.

    There the mean square is the variance. Whatever is added to the stream gets its mean
    subtracted in the weights that make it, which is nothing to the norms that read the stream, as
    they subtract it themselves: Jiang, Gu and Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers",
    NeurIPS 2023, arXiv 2305.14858.

    Raises:
        CannotConvert: it is no layer normalization over the same channels, or what it reads is no
            such stream.
    """
    if start.fidelity is Fidelity.EXACT:
        return start
    if state.rule != Rule.always(POSITION) or rule != Rule.always(_POSITION):
        reason = "it is no layer normalization over the channels of a position"
    elif eps != state.eps or start.fidelity is Fidelity.FRESH:
        reason = "it is asked for another eps, or for none of its affine"
    else:
        reason = state.stream.problem
    if reason:
        raise CannotConvert(
            f"no RMSNorm can be exact here: {reason}", "leave out exact=, or this layer by skip="
        )
    stream = state.stream
    exact = Fidelity.EXACT if stream.training else Fidelity.EVAL
    note = (
        f"the mean is taken out of {len(stream.writers)} tensors that write to its stream, and so "
        "out of features that are read there"
    )
    return replace(start, fidelity=exact, beside=(*start.beside, *stream.writers)).noted(note)


def read_rms_norm(module: nn.Module, *, norm: str = "rms", channel_dim: int = -1) -> NormState:
    """Read an RMSNorm over its last dimension, or one over C at ``channel_dim``."""
    shape = tuple(module.normalized_shape)  # type: ignore[arg-type]
    given = tensors(module)
    eps = _epsilon(module, given["weight"])
    per_channel = len(shape) == 1
    return NormState(
        norm=norm,
        kind="rms_norm",
        num_features=shape[-1] if per_channel else shape[0],
        rule=Rule.always(_POSITION if per_channel else per_group(shape[0], centred=False)),
        eps=eps,
        obstacle=over_several(shape, given["weight"]),
        settings={"eps": module.eps, "affine": given["weight"] is not None},
        **given,
        **({"channel_dim": channel_dim if per_channel else 1} | layout(module)),
    )


def _eps_of(state: NormState) -> float | None:
    """The source's eps; ``None`` from an RMSNorm that adds what its precision calls for."""
    left_open = state.kind == "rms_norm" and state.settings.get("eps", state.eps) is None
    return None if left_open else state.eps


def _epsilon(module: nn.Module, weight: Tensor | None) -> float:
    """The eps that is added."""
    if isinstance(module.eps, float):
        return module.eps
    return default_eps(weight)


def default_eps(weight: Tensor | None) -> float:
    """What torch adds where no eps is given: the eps of the precision that it computes in."""
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def read_rms_norm_map(module: nn.Module) -> NormState:
    """Read an RMSNormMap."""
    if not isinstance(module, RMSNormMap):
        raise TypeError(f"expected an RMSNormMap, got {type(module).__name__}")
    return NormState(
        norm="rms",
        kind="rms_norm",
        num_features=module.num_features,
        rule=Rule.always(per_group(module.num_features, centred=False)),
        eps=module.eps,
        settings={"eps": module.eps, "affine": module.weight is not None},
        **tensors(module),
        **layout(module),
    )


ENTRIES = (
    NormEntry(
        name="rms",
        aliases=("rms_norm", "rmsnorm"),
        kind="rms_norm",
        axis="standardization",
        pooled="C at a position (tokens); C × H·W, per sample (maps)",
        paper="Zhang and Sennrich 2019, arXiv 1910.07467",
        sources=frozenset({"layer_norm", "rms_norm"}),
        start=start_rms_norm,
        reads={
            nn.RMSNorm: read_rms_norm,
            RMSNorm: read_rms_norm,
            RMSNormMap: read_rms_norm_map,
        },
        options=(EPS, AFFINE, EXACT),
    ),
    NormEntry(
        name="rms2d",
        aliases=("rms_norm_2d", "rmsnorm2d", "rms_norm2d"),
        kind="rms_norm",
        axis="standardization",
        pooled="C at a position of a map",
        paper="Zhang and Sennrich 2019, arXiv 1910.07467",
        sources=MAP_SOURCES | {"layer_norm", "rms_norm"},
        start=start_rms_norm_2d,
        reads={RMSNorm2d: partial(read_rms_norm, norm="rms2d")},
        options=(EPS, AFFINE, EXACT),
    ),
)
