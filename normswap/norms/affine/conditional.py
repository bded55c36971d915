"""Conditional norms: a class or an embedding tells gain and offset.

Batch normalization: de Vries, Strub, Mary, Larochelle, Pietquin and Courville, "Modulating early
visual processing by language", NeurIPS 2017, arXiv 1707.00683. Instance normalization: Dumoulin,
Shlens and Kudlur, "A Learned Representation for Artistic Style", ICLR 2017, arXiv 1610.07629.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.affine.bases import PlainBatchNorm, PlainInstanceNorm
from normswap.norms.affine.conditioned import ON_ANY_BASE, BySample
from normswap.norms.declared import declared
from normswap.norms.entry import whole
from normswap.norms.inputs.kinds import ExtraInput, Form

__all__ = [
    "ENTRIES",
    "ConditionalBatchNorm",
    "ConditionalInstanceNorm",
    "ConditionalNorm",
]

LEAST_HIDDEN, MOST_HIDDEN = 64, 512


class ConditionalNorm(BySample):
    """(weight + Δw(y)) · z + (bias + Δb(y)), where z is standardized by the base.

    By ``label=``, of classes or styles: Δw and Δb are rows of tables, or of several rows the mean
    by weights that are given in its place. By ``condition=``, of embeddings: each is a network of
    one hidden layer. Both start at zero.

    Args:
        num_features: C.
        num_classes: K, the number of rows; or
        condition_dim: E, the size of embeddings.
        hidden_dim: of the networks. Default E, but 64 to 512.
        **rest: as for the base.

    Attributes:
        class_weight_delta: (K, C), as is class_bias_delta; or
        weight_net: the network, as is bias_net.

    Raises:
        OptionError: neither num_classes nor condition_dim is given, or both.
    """

    own = ("class_weight_delta", "class_bias_delta", "weight_net", "bias_net")
    class_weight_delta: nn.Parameter
    class_bias_delta: nn.Parameter
    weight_net: nn.Sequential
    bias_net: nn.Sequential

    def __init__(
        self,
        num_features: int,
        *,
        num_classes: int | None = None,
        condition_dim: int | None = None,
        hidden_dim: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        if (num_classes is None) == (condition_dim is None):
            raise OptionError(
                "give num_classes= for label=, or condition_dim= for condition=, and not both"
            )
        self.num_classes = num_classes
        self.condition_dim = condition_dim
        self.hidden_dim = hidden_dim
        for name in ("weight", "bias"):
            if num_classes is not None:
                table = torch.zeros(num_classes, num_features)
                self.register_parameter(f"class_{name}_delta", nn.Parameter(table))
            elif condition_dim is not None:
                hidden = hidden_dim or min(MOST_HIDDEN, max(LEAST_HIDDEN, condition_dim))
                last = nn.Linear(hidden, num_features, bias=False)
                nn.init.zeros_(last.weight)
                net = nn.Sequential(nn.Linear(condition_dim, hidden), nn.ReLU(), last)
                self.add_module(f"{name}_net", net)

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """A class, or weights of all; or an embedding."""
        classes, features = self.num_classes, self.condition_dim
        if classes is None:
            return (ExtraInput("condition", (Form(("N", features or 0), "numbers"),)),)
        forms = (
            Form(("N",), "integers", classes),
            Form(("N", classes), "numbers"),
            Form((), "integers", classes),
        )
        return (ExtraInput("label", forms),)

    @property
    def deltas(self) -> tuple[str, ...]:
        """The tables, or the last layers of the networks."""
        if self.num_classes is not None:
            return "class_weight_delta", "class_bias_delta"
        return "weight_net.2.weight", "bias_net.2.weight"

    def predicted(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables, or what the networks say."""
        if self.num_classes is not None:
            shares = self.shares_of("label", self.num_classes, mean)
            tables = self.class_weight_delta, self.class_bias_delta
            weight, bias = (shares @ table.to(mean.dtype) for table in tables)
        else:
            _, condition = self.called_with("condition", mean)
            given = condition.to(self.weight_net[0].weight.dtype)
            weight, bias = self.weight_net(given), self.bias_net(given)
        return weight, bias


class ConditionalBatchNorm(ConditionalNorm, PlainBatchNorm):
    """A `ConditionalNorm` on batch normalization."""


class ConditionalInstanceNorm(ConditionalNorm, PlainInstanceNorm):
    """A `ConditionalNorm` on instance normalization."""


_INPUTS = ("label", "condition")
_OPTIONS = (
    whole("num_classes", None, "rows of the tables; or"),
    whole("condition_dim", None, "size of an embedding"),
    whole("hidden_dim", None, "of its networks; None: condition_dim, 64 to 512"),
)

ENTRIES = (
    declared(
        ConditionalBatchNorm,
        name="cond_bn",
        aliases=("conditional_batch_norm", "ccbn"),
        kind="batch_norm",
        axis="affine",
        pooled="N × H·W, per channel",
        paper="de Vries et al. 2017, arXiv 1707.00683",
        options=_OPTIONS,
        inputs=_INPUTS,
    ),
    declared(
        ConditionalInstanceNorm,
        name="cond_in",
        aliases=("conditional_instance_norm", "cin"),
        kind="instance_norm",
        axis="affine",
        pooled="H·W, per sample and channel",
        paper="Dumoulin et al. 2017, arXiv 1610.07629",
        options=_OPTIONS,
        inputs=_INPUTS,
    ),
    declared(
        ConditionalNorm,
        name="cond",
        aliases=("conditional_norm",),
        kind="batch_norm",
        axis="affine",
        pooled="as its base",
        paper="de Vries et al. 2017, arXiv 1707.00683",
        options=(*_OPTIONS, *ON_ANY_BASE),
        inputs=_INPUTS,
    ),
)
