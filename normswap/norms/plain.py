"""What norms share that are written in plain torch, and none of torch's own.

Such a norm says by its class what a registry entry needs to know of it: what it pools over, what
it keeps, what it has to be told, how it is chosen for a source. `normswap.norms.declared` makes
the entry, with its starter and its reader, of that. What it computes is written in one of two
ways: `normswap.norms.measured` for arithmetic on each channel's mean and variance, and
`normswap.norms.affine_norm` for all else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.base import Norm
from normswap.norms.counts import PLAIN, Counts
from normswap.norms.entry import EPS, Option
from normswap.norms.pool import Rule
from normswap.norms.start import Carry, Start
from normswap.norms.state import NormState
from normswap.norms.sync import ranks

__all__ = ["PlainNorm"]


class PlainNorm(Norm, ABC):
    """A norm of inputs (N, C, ...), with a gain and an offset per channel.

    Args:
        num_features: C.
        eps: what keeps from dividing by zero, or is kept for a norm that does. Default 1e-5.
        momentum: weight of the newest batch in what is kept, or kept for a norm that has one;
            ``None`` for the plain average of all. Default 0.1.
        sync: whether the batch of training is that of all ranks.
        process_group: the ranks that share it; ``None`` for all.
        dim: how many dimensions follow the channels, kept for a conversion to a norm that has to
            know. Any input (N, C, ...) is taken.

    Attributes:
        weight: (C,) or ``None``, as is bias. A module is made without them; `normswap.build` and
            `normswap.convert` put them in.
        tracks: whether such norms keep running statistics.
        retells: whether they keep them in terms of their own.
        synchronizes: whether they have ``sync``.
        eps_option: how eps is set; ``None`` where it is only kept.
        absorbs_eps: whether what they keep makes up for an eps that is not the source's.
        usually_affine: whether they have weight and bias where nothing tells.
        counts: how weight and bias enter until something is learned beside them.

    Raises:
        OptionError: ``sync`` is set where no batch is pooled.
    """

    tracks: ClassVar[bool] = False
    retells: ClassVar[bool] = False
    synchronizes: ClassVar[bool] = False
    eps_option: ClassVar[Option | None] = EPS
    absorbs_eps: ClassVar[bool] = False
    usually_affine: ClassVar[bool] = True
    counts: ClassVar[Counts] = PLAIN
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        sync: bool = False,
        process_group: Any = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if sync and not self.synchronizes:
            name = type(self).__name__
            raise OptionError(f"a {name} pools over no batch: there is nothing to synchronise")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.process_group = process_group
        self.dim = dim
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @classmethod
    def variant(cls, **given: Any) -> type[PlainNorm]:
        """The class to make, where options tell which. Default: this one.

        Args:
            given: the options that it has alone.

        Raises:
            OptionError: there is none.
        """
        return cls

    @classmethod
    def chosen(cls, state: NormState, carry: Carry, **given: Any) -> dict[str, Any]:
        """The keywords that the class is made with, in place of a source.

        What is not given is the class's default, unless a norm has a better one for the source.

        Args:
            state: the source.
            carry: how the norm starts.
            given: the options that it has alone, ``None`` where one is not given.

        Raises:
            NormSwapError: there is no such norm for this source.
        """
        return {name: value for name, value in given.items() if value is not None}

    @abstractmethod
    def pools(self, *, tracks: bool) -> Rule:
        """What it pools over, given what it has learned; on a meta device, as it starts.

        Args:
            tracks: whether it has the running statistics that others have too.
        """

    def kept(self, state: NormState) -> Mapping[str, Tensor]:
        """The source's running statistics in the terms in which this norm keeps them."""
        return {}

    def retold(self) -> Mapping[str, Any]:
        """What a reader says of it otherwise: fields of `NormState`.

        First of all the running mean and variance by which a batch norm would evaluate as it does.
        """
        return {}

    def settings(self, names: Iterable[str]) -> dict[str, object]:
        """The values of options that it has alone."""
        return {name: getattr(self, name) for name in names}

    def note(self, state: NormState) -> str:
        """What the user should know of its start."""
        return ""

    def obstacle(self) -> str:
        """Why what it has learned beside weight and bias has no counterpart in another norm."""
        return ""

    def started(self, state: NormState, start: Start) -> Start:
        """Its start, with what it changes outside of it and what else only it knows.

        Args:
            state: the source.
            start: what follows from what it pools over.

        Raises:
            CannotConvert: the source does not stand where such a norm can.
        """
        return start

    def settle(self, state: NormState) -> None:
        """Take children and references from what stands around it, before it is put in place."""

    def reset_parameters(self) -> None:
        """Write what parameters start with that depends on the source, in their own precision."""

    @property
    def pools_ranks(self) -> bool:
        """Whether the batch is that of several ranks."""
        return self.sync and self.training and ranks(self.process_group) > 1

    @property
    def called(self) -> str:
        """What an error calls it."""
        return self.site_path or type(self).__name__

    @torch.no_grad()
    def track(self, **measured: Tensor) -> None:
        """Count the batch, and let what is kept under these names follow what was measured."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        self.follow(**measured)

    @torch.no_grad()
    def follow(self, **measured: Tensor) -> None:
        """Let what is kept follow what else was measured of a batch that has been counted."""
        count = self.num_batches_tracked
        share: float | Tensor = 0.0 if self.momentum is None else self.momentum
        for name, new in measured.items():
            if self.momentum is None and count is not None:
                share = count.to(new.dtype).reciprocal()
            kept = self.get_buffer(name)
            if kept.dtype == new.dtype:
                kept.lerp_(new, share)
            else:
                kept.copy_(torch.lerp(kept.to(new.dtype), new, share))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Papers' own code keeps these as (1, C, 1, 1) and counts no batches.
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            theirs = state_dict.get(prefix + name)
            if own is None or theirs is None or own.shape != (self.num_features,):
                continue
            if theirs.ndim > 1 and theirs.numel() == self.num_features:
                state_dict[prefix + name] = theirs.reshape(-1)
        count = self._buffers.get("num_batches_tracked")
        if count is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", count)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say size, eps and, where something is kept, momentum, as torch's norms do."""
        momentum = f", momentum={self.momentum}" if self.tracks else ""
        return f"{self.num_features}, eps={self.eps}{momentum}"
