"""Adaptive instance normalization: a style tells each channel's deviation and mean.

Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
ICCV 2017, arXiv 1703.06868. By a style vector: Huang et al. 2018, arXiv 1804.04732, and Karras et
al. 2018, arXiv 1812.04948.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normswap.errors import InputError
from normswap.norms.affine.bases import PlainInstanceNorm
from normswap.norms.affine.conditioned import BySample
from normswap.norms.declared import declared
from normswap.norms.entry import flag, whole
from normswap.norms.inputs.kinds import ExtraInput, Form

__all__ = ["ENTRIES", "AdaptiveInstanceNorm", "Collected", "StyleInput"]

#: Mean and deviation of every sample's channel, each (N, C), by the norm's path in the model.
Features = dict[str, tuple[Tensor, Tensor]]


class Collected:
    """Stands for a style while the style itself goes through the network.

    Attributes:
        features: what the norms have measured so far.
    """

    def __init__(self) -> None:
        self.features: Features = {}


@dataclass(frozen=True)
class StyleInput(ExtraInput):
    """The features of a style, as `normswap.style_features` collects them."""

    def refuse_misfit(self, value: Any, samples: Collection[int]) -> None:
        """Raise unless they are features of as many samples as the batch has, or of one."""
        if isinstance(value, Collected):
            return
        if not isinstance(value, Mapping):
            raise InputError(f"{self}, and got a {type(value).__name__}")
        for mean, _ in value.values():
            if samples and len(mean) != 1 and len(mean) not in samples:
                sizes = " or ".join(map(str, sorted(samples)))
                raise InputError(f"{self}, of 1 or {sizes} samples here, and got {len(mean)}")

    def __str__(self) -> str:
        return f"{self.name}= should be what normswap.style_features(model, ...) gives"


class AdaptiveInstanceNorm(BySample, PlainInstanceNorm):
    """Instance normalization whose gain and offset follow a style.

    With ``style_dim``, (weight + Δw(s)) · z + (bias + Δb(s)), with a linear layer of the style
    vector for both, which starts at zero. Without it deviation · z + mean, by those of
    what the style has at this place in the network; and weight · z + bias where none is given.

    Args:
        num_features: C.
        style_dim: S, the size of a style vector; ``None`` for features.
        unbiased: of features, whether both variances are unbiased, and eps is in both roots, as
            in the much used port to PyTorch. In the authors' code, and by default, they are
            biased, and a style's deviation is without eps.
        **rest: as for `MeasuredNorm`.
    """

    own = ("style_linear",)
    style_linear: nn.Linear

    def __init__(
        self,
        num_features: int,
        *,
        style_dim: int | None = None,
        unbiased: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.style_dim = style_dim
        self.unbiased = unbiased
        if style_dim is not None:
            self.style_linear = nn.Linear(style_dim, 2 * num_features)
            nn.init.zeros_(self.style_linear.weight)
            nn.init.zeros_(self.style_linear.bias)

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """A style vector, or features."""
        if self.style_dim is not None:
            return (ExtraInput("style", (Form(("N", self.style_dim), "numbers"),)),)
        return (StyleInput("style", (Form(("N", "*"), "numbers"),), required=False),)

    @property
    def deltas(self) -> tuple[str, ...]:
        """The linear layer."""
        return () if self.style_dim is None else ("style_linear.weight", "style_linear.bias")

    def predicted(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """What the linear layer makes of the style."""
        _, style = self.called_with("style", mean)
        made = self.style_linear(style.to(self.style_linear.weight.dtype))
        weight, bias = made.to(mean.dtype).chunk(2, 1)
        return weight, bias

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """By the style vector; or with the style's statistics in the place of the input's."""
        if self.style_dim is not None:
            return super().rule(mean, var, positions)
        self.refuse_single_value(positions, "use a larger map")
        var = var * (positions / (positions - 1)) if self.unbiased else var
        gain = (var + self.eps).rsqrt()
        offset = -gain * mean
        weight, bias = self._of_features(mean, var)
        return gain * weight, offset * weight + bias

    def _of_features(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The style's deviation and mean here; weight and bias without a style."""
        _, style = self.called_with("style", mean)
        place = self.site_path
        if style is None or isinstance(style, Collected):
            if style is not None and place in style.features:
                raise InputError(
                    f"{place or 'this norm'} is called several times in a forward, so that which "
                    "call a style's features belong to is not known; give it a style_dim="
                )
            if style is not None:
                style.features[place] = mean, (var + self.eps * self.unbiased).sqrt()
            weight = mean.new_ones(()) if self.weight is None else self.weight.to(mean.dtype)
            return weight, mean.new_zeros(()) if self.bias is None else self.bias.to(mean.dtype)
        if place not in style:
            raise InputError(
                f"style= has no features for {place or 'this norm'}; collect them with the same "
                "model, by normswap.style_features"
            )
        centre, deviation = (each.to(mean.dtype) for each in style[place])
        if len(centre) not in (1, len(mean)):
            raise InputError(
                f"{place} is given {len(mean)} samples, and style= is of {len(centre)}"
            )
        return deviation, centre


ENTRIES = (
    declared(
        AdaptiveInstanceNorm,
        name="adain",
        aliases=("adaptive_instance_norm",),
        kind="instance_norm",
        axis="affine",
        pooled="H·W, per sample and channel",
        paper="Huang and Belongie 2017, arXiv 1703.06868",
        options=(
            whole("style_dim", None, "size of a style vector; None: features of a style"),
            flag("unbiased", False, "of features: unbiased variances, as a port to PyTorch"),
        ),
        inputs=("style",),
    ),
)
