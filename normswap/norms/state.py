"""The canonical state of any normalization: what every source is read into.

There is no table of pairs of norms. A reader turns a module into a `NormState`, a starter turns a
`NormState` into a new norm: N readers and M starters serve N×M conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.beside import Activation, Neighbour, Previous, Stream
from normswap.norms.counts import PLAIN, Counts
from normswap.norms.pool import BATCH, NOTHING, RUNNING, Rule
from normswap.norms.precision import precise

__all__ = [
    "AFFINE_TENSORS",
    "RUNNING_STATISTICS",
    "TENSORS",
    "Itself",
    "NormState",
    "batch_rule",
    "fresh_state",
]

#: The tensors that norms share, by the names that they have in torch's own state dicts.
AFFINE_TENSORS = ("weight", "bias")
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TENSORS = (*AFFINE_TENSORS, *RUNNING_STATISTICS)


@dataclass(frozen=True)
class Itself:
    """What a norm is in terms of its own, for the same norm with another setting.

    Args:
        rule: what it pools over, with what it has learned.
        terms: the tensors that mean something to such a norm only, by name; none if it has others
            than its own.
    """

    rule: Rule
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class NormState:
    """One normalization, told in terms that belong to no family.

    Args:
        norm: registry name of the norm that was read; empty for one that is known and no target.
            Nothing at all can be started from such a norm that has an ``obstacle``.
        kind: its family: ``"batch_norm"``, ``"group_norm"``, ...
        num_features: number of channels, C.
        rule: what it pools over in train and in eval mode.
        eps: added to the variance, inside the root.
        momentum: weight of the newest batch in the running statistics (torch's convention);
            ``None`` is the cumulative average.
        weight: per-channel gain (C,), the owner's own tensor, or ``None``.
        bias: per-channel offset (C,), likewise.
        running_mean: mean (C,), or ``None`` where none is tracked.
        running_var: unbiased variance (C,), likewise.
        num_batches_tracked: a long scalar, likewise.
        retold: whether the norm keeps its running statistics in terms of its own, so that those
            above are computed, and another norm takes copies of them.
        dim: number of dimensions after the channels that the class accepts (0 or more), where
            the class, the producer or an example tells; ``None`` where nothing does.
        channel_dim: where the channels are in the input: 1, or -1 for token layouts.
        flattens: whether what follows the channels is seen as one dimension, because nothing can
            tell how many there are.
        tail: names of what runs after the norm (a fused dropout, an activation): of children of
            its, or of ``within``.
        within: what of the tail is a part of the norm's own formula, by name: how it is made for
            another norm, which has it behind. The norm is not that with such a part behind it:
            what it computes is both in one.
        own: names of tensors that mean something to this norm only, where it is none of ours, and
            do not move on to a norm that replaces it.
        settings: the norm's option values, by the names of its registry entry.
        trainable: whether weight and bias were trainable before a freeze, by name.
        parametrized: whether weight or bias is computed by a parametrization.
        counts: how weight and bias enter what the norm computes.
        itself: the norm in terms of its own, where it has some.
        names: what the module calls tensors, by their names here, where it calls them otherwise.
        obstacle: why the affine cannot be carried to another family; empty if it can.
        producer: the layer that feeds the norm, told only where the target needs it.
        consumer: the layer that alone reads the norm, likewise.
        previous: the norm before the producer, likewise.
        activation: the activation that alone reads the norm, likewise.
        stream: the residual stream that the norm reads, likewise.
        like: a tensor whose device and dtype new tensors take.
    """

    norm: str
    kind: str
    num_features: int
    rule: Rule
    eps: float = 1e-5
    momentum: float | None = 0.1
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    retold: bool = False
    dim: int | None = None
    channel_dim: int = 1
    flattens: bool = False
    tail: tuple[str, ...] = ()
    within: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    trainable: Mapping[str, bool] = field(default_factory=dict)
    parametrized: bool = False
    counts: Counts = PLAIN
    itself: Itself | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    obstacle: str = ""
    producer: Neighbour = field(default_factory=Neighbour)
    consumer: Neighbour = field(default_factory=Neighbour)
    previous: Previous = field(default_factory=Previous)
    activation: Activation = field(default_factory=Activation)
    stream: Stream = field(default_factory=Stream)
    like: Tensor | None = None

    @property
    def affine(self) -> bool:
        """Whether there is a gain or an offset."""
        return self.weight is not None or self.bias is not None

    @property
    def tracks(self) -> bool:
        """Whether running statistics are kept."""
        return self.running_mean is not None and self.running_var is not None

    def behind(self, norm: nn.Module) -> dict[str, nn.Module]:
        """What runs after the norm that was read, by name, in order."""
        held: dict[str, Any] = norm._modules
        return {name: held[name] if name in held else self.within[name]() for name in self.tail}

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """What weight and bias make in what the norm computes, (C,) each, in double precision."""
        one = precise(self.reference().new_ones(self.num_features))
        weight = one if self.weight is None else precise(self.weight)
        return self.counts.applied(
            weight, torch.zeros_like(one) if self.bias is None else precise(self.bias)
        )

    def reference(self) -> Tensor:
        """A tensor that tells device and dtype for what has to be made anew."""
        for tensor in (self.weight, self.bias, self.running_mean, self.like):
            if tensor is not None:
                return tensor
        return torch.empty(0)


def batch_rule(*, tracks: bool) -> Rule:
    """BatchNorm's rule: the batch in train mode; in eval the running statistics, if tracked."""
    return Rule(BATCH, RUNNING if tracks else BATCH)


def fresh_state(num_features: int, *, dim: int, like: Tensor | None = None) -> NormState:
    """The state of a norm that was never trained: no tensors, nothing standardized.

    It is what `normswap.build` starts every norm from.
    """
    return NormState(
        norm="",
        kind="",
        num_features=num_features,
        rule=Rule.always(NOTHING),
        dim=dim,
        like=like,
    )
