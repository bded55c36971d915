"""Attentive normalization: gain and offset of each sample are mixed of several.

Li, Sun and Wu, "Attentive Normalization", ECCV 2020, arXiv 1908.01259. Another method than the
one of the same name for image generation.

How much each of K gains and offsets counts is read from the sample: its channels' means, divided
by their deviations, go through one or two linear maps, with a batch normalization of the samples'
features, to a share between 0 and 1. The paper has K rows for weight and for bias. Here a row is
what weight or bias, which all have in common, and a row of differences make together: the same
function, and a norm's own weight and bias stay. At the start all shares are even, and the
differences cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import BATCH, RUNNING, Rule
from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "AttentiveBatchNorm"]

MIXTURES = 10
ATTENTION = 2

#: How far rows are from each other at first, as a share of the weight.
NOISE = 0.1

#: What a linear map has, with its batch normalization.
_OF_LAYER = ("weight", "bias", "gain", "mean", "var")

#: Added to the variance of each sample's channel, and to that of a feature over the samples.
OWN_EPS, FEATURE_EPS = 1e-3, 1e-5


def _hard_sigmoid(features: Tensor) -> Tensor:
    return (features + 3).clamp(0, 6) / 6


def _softmax(features: Tensor) -> Tensor:
    return features.softmax(1)


@dataclass(frozen=True)
class _Attention:
    """A way from a sample's channels to its shares.

    Args:
        squash: makes shares of features (N, K).
        normalized: whether features are normalized over the batch, which a bias would not survive.
        hidden: whether there is a layer of 2 K features with a ReLU before.
    """

    squash: Callable[[Tensor], Tensor]
    normalized: bool
    hidden: bool = False


#: By the numbers that they have in the authors' code.
_WAYS = (
    _Attention(torch.sigmoid, normalized=False),
    _Attention(torch.sigmoid, normalized=False, hidden=True),
    _Attention(_hard_sigmoid, normalized=True),
    _Attention(_hard_sigmoid, normalized=True, hidden=True),
    _Attention(_hard_sigmoid, normalized=False),
    _Attention(torch.sigmoid, normalized=True),
    _Attention(_softmax, normalized=True),
)


class AttentiveBatchNorm(MeasuredNorm):
    """Σₖ λₖ · (s · (weight + weight_delta[k]) · BN(x) + s · (bias + bias_delta[k])).

    The shares λ are a sample's own. s is 2 / K, or 1 where they add up to 1.

    Args:
        num_features: C.
        num_mixtures: K. Default 10.
        attention: what makes the shares of a linear map, as numbered in the authors' code:
            0 sigmoid; 1 ReLU, another map, sigmoid; 2 batch normalization, hard sigmoid; 3 batch
            normalization, ReLU, another map, batch normalization, hard sigmoid; 4 hard sigmoid;
            5 batch normalization, sigmoid; 6 batch normalization, softmax. Default 2.
        **rest: as for `MeasuredNorm`; ``sync`` is for the features' batch, too.

    Attributes:
        weight_delta: (K, C), as is bias_delta; rows of noise at the start, which
            cancel each other out.
        attention_weight: the last map, (K, C), or (K, 2 K) with two.
        attention_bias: (K,), of the map, or of the batch normalization that follows it.
        attention_gain: (K,), of that batch normalization, where there is one; zero at the start.
        attention_mean: (K,), its running mean; attention_var: (K,), its running variance.
        hidden_weight: (2 K, C), the first map, where there are two; hidden_bias, hidden_gain,
            hidden_mean and hidden_var are likewise.

    Raises:
        DegeneratePooling: at a forward in training on a single value for each channel, or with
            batch normalization of features on a single sample.
    """

    own = (
        *("weight_delta", "bias_delta"),
        *(f"{layer}_{name}" for layer in ("hidden", "attention") for name in _OF_LAYER),
    )
    weight_delta: nn.Parameter
    bias_delta: nn.Parameter
    attention_weight: nn.Parameter
    attention_bias: nn.Parameter
    attention_gain: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        num_mixtures: int = MIXTURES,
        attention: int = ATTENTION,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.num_mixtures = num_mixtures
        self.attention = attention
        for name, value in self._rows(torch.ones(num_features)).items():
            self.register_parameter(name, nn.Parameter(value))
        generator = torch.Generator().manual_seed(0)
        size = num_features
        for layer, features in self._layers():
            bound = 1 / math.sqrt(size)
            weight = (torch.rand(features, size, generator=generator) * 2 - 1) * bound
            last, size = layer == "attention", features
            if last and not self._way.normalized:
                weight.zero_()
            self.register_parameter(f"{layer}_weight", nn.Parameter(weight))
            self.register_parameter(f"{layer}_bias", nn.Parameter(torch.zeros(features)))
            if self._way.normalized:
                gain = torch.full((features,), float(not last))
                self.register_parameter(f"{layer}_gain", nn.Parameter(gain))
                self.register_buffer(f"{layer}_mean", torch.zeros(features))
                self.register_buffer(f"{layer}_var", torch.ones(features))

    @property
    def _way(self) -> _Attention:
        """How shares are made."""
        return _WAYS[self.attention]

    @property
    def _scale(self) -> float:
        """What rows are multiplied by, so that even shares make one of them."""
        return 1.0 if self._way.squash is _softmax else 2 / self.num_mixtures

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize by the batch, and mix gain and offset."""
        centre, spread = self.over_batch(mean, var, positions)
        root = (spread + self.eps).rsqrt()
        one = torch.ones_like(root)
        weight = one if self.weight is None else self.weight
        bias = torch.zeros_like(one) if self.bias is None else self.bias
        with torch.autocast(mean.device.type, enabled=False):
            shares = self._scale * self._shares(mean, var, positions)
            gain = root * self._mixed(shares, weight, "weight")
            offset = self._mixed(shares, bias, "bias") - gain * centre
        return gain, offset

    def _mixed(self, shares: Tensor, common: Tensor, name: str) -> Tensor:
        """Rows of gain or offset, mixed by shares (N, K)."""
        rows: Tensor = common + getattr(self, f"{name}_delta")
        return shares @ rows.to(shares.dtype)

    def _shares(self, mean: Tensor, var: Tensor, positions: int) -> Tensor:
        """λ, (N, K)."""
        unbiased = var * (positions / (positions - 1)) if positions > 1 else var
        features = mean * (unbiased + OWN_EPS).rsqrt()
        for layer, _ in self._layers():
            if layer == "attention" and self._way.hidden:
                features = features.relu()
            features = self._mapped(features, layer)
        return self._way.squash(features)

    def _mapped(self, features: Tensor, layer: str) -> Tensor:
        """A linear map of features, and where it is normalized over the batch, that."""

        def parameter(name: str) -> Tensor:
            given: Tensor = getattr(self, f"{layer}_{name}")
            return given.to(features.dtype)

        mapped = features @ parameter("weight").mT
        if not self._way.normalized:
            return mapped + parameter("bias")
        mean, var = (self.get_buffer(f"{layer}_{name}") for name in ("mean", "var"))
        if self.training and not self.observed:
            centre, spread, samples = self.of_batch(mapped, torch.zeros_like(mapped), 1)
            if samples:
                unbiased = spread * (samples / (samples - 1))
                self.follow(**{f"{layer}_mean": centre, f"{layer}_var": unbiased})
        else:
            centre, spread = mean.to(mapped.dtype), var.to(mapped.dtype)
        gain = parameter("gain") * (spread + FEATURE_EPS).rsqrt()
        return mapped * gain + (parameter("bias") - centre * gain)

    def _layers(self) -> Iterator[tuple[str, int]]:
        """The linear maps with their numbers of features."""
        if self._way.hidden:
            yield "hidden", 2 * self.num_mixtures
        yield "attention", self.num_mixtures

    def started(self, state: NormState, start: Start) -> Start:
        """Start with rows that suit the weight."""
        return start if start.fresh else replace(start, kept=partial(self._suited, state, start))

    def _suited(self, state: NormState, start: Start) -> dict[str, Tensor]:
        """Rows for the weight that it starts with."""
        rows = self._rows(start.affine_of(state)[0])
        dtype = state.reference().dtype
        return {**start.kept(), **{name: value.to(dtype) for name, value in rows.items()}}

    def _rows(self, weight: Tensor) -> dict[str, Tensor]:
        """Rows of noise of the weight's size, the same each time; two and two cancel out."""
        generator = torch.Generator().manual_seed(1)
        size = NOISE * torch.where(weight == 0, 1, weight.abs())
        pairs, odd = divmod(self.num_mixtures, 2)
        made = {}
        for name in ("weight_delta", "bias_delta"):
            drawn = torch.randn(pairs, self.num_features, generator=generator).to(weight) * size
            made[name] = torch.cat([drawn, -drawn, drawn.new_zeros(odd, self.num_features)])
        return made

    def pools(self, *, tracks: bool) -> Rule:
        """The batch."""
        return Rule(BATCH, RUNNING if tracks else BATCH)

    def obstacle(self) -> str:
        """No other norm mixes."""
        told = self.attention_gain if self._way.normalized else self.attention_weight
        if told.is_meta or not (told.any() or self.attention_bias.any()):
            return ""
        return "its attention has learned to depend on the sample, as no other norm's does"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_way(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(_WAYS)


ENTRIES = (
    declared(
        AttentiveBatchNorm,
        name="an",
        aliases=("attentive_norm", "mixture_batch_norm"),
        kind="batch_norm",
        axis="affine",
        pooled="N × H·W per channel; gain and offset by H·W of all channels of a sample",
        paper="Li et al. 2020, arXiv 1908.01259",
        options=(
            Option("num_mixtures", MIXTURES, "how many are mixed", "1 or more", _is_count),
            Option("attention", ATTENTION, "how shares are made", "from 0 to 6", _is_way),
        ),
    ),
)
