"""Batch normalization of several kinds of samples, each by statistics of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.inputs.kinds import is_looked_at
from normswap.norms.inputs.norm import InputNorm
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import Rule
from normswap.norms.start import Start
from normswap.norms.state import RUNNING_STATISTICS, NormState, batch_rule
from normswap.norms.sync import merged_each

__all__ = ["DomainNorm"]


class DomainNorm(InputNorm, MeasuredNorm):
    """Batch normalization by the statistics of each sample's own domain.

    A batch may mix domains. One that is not in it keeps its running statistics, and gets
    gradients of zero, so that no rank waits for it. Weight and bias are all domains', and what
    each adds to them starts at zero.

    Args:
        num_features: C.
        num_domains: D.
        separate: whether each domain adds to weight and bias what it learns.
        **rest: as for `MeasuredNorm`.

    Attributes:
        running_mean: (C,) of domain 0, as are running_var and num_batches_tracked.
        other_running_mean: (D - 1, C) of the others, as is other_running_var.
        other_num_batches_tracked: (D - 1,).
        domain_weight_delta: (D, C), as is domain_bias_delta; ``None`` where nothing is separate.

    Raises:
        DegeneratePooling: at a forward in training where a domain has a single value for each
            channel.
    """

    own = (
        "domain_weight_delta",
        "domain_bias_delta",
        *(f"other_{name}" for name in RUNNING_STATISTICS),
    )
    measurable = False
    other_running_mean: Tensor
    other_running_var: Tensor
    other_num_batches_tracked: Tensor
    domain_weight_delta: nn.Parameter | None
    domain_bias_delta: nn.Parameter | None

    def __init__(
        self, num_features: int, *, num_domains: int, separate: bool = True, **rest: Any
    ) -> None:
        super().__init__(num_features, **rest)
        self.num_domains = num_domains
        for name in ("domain_weight_delta", "domain_bias_delta"):
            delta = nn.Parameter(torch.zeros(num_domains, num_features)) if separate else None
            self.register_parameter(name, delta)
        others = num_domains - 1
        self.register_buffer("other_running_mean", torch.zeros(others, num_features))
        self.register_buffer("other_running_var", torch.ones(others, num_features))
        counts = torch.zeros(others, dtype=torch.long)
        self.register_buffer("other_num_batches_tracked", counts)

    @abstractmethod
    def shares(self, mean: Tensor) -> Tensor:
        """1 where a sample is of a domain and 0 elsewhere, (N, D), of the dtype of mean."""

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Standardize every sample by its domain."""
        with torch.autocast(mean.device.type, enabled=False):
            return self._rule(mean, var, positions, self.shares(mean))

    def _rule(
        self, mean: Tensor, var: Tensor, positions: int, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.training or self.running_mean is None:
            centre, spread = self._of_batch(mean, var, positions, shares)
        else:
            centre, spread = (kept.to(mean.dtype) for kept in self._kept())
        gain = (spread + self.eps).rsqrt()
        offset = -gain * centre
        weight = None if self.weight is None else self.weight.to(mean.dtype)
        if self.domain_weight_delta is not None and self.domain_bias_delta is not None:
            one = mean.new_ones(()) if weight is None else weight
            weight = one + self.domain_weight_delta.to(mean.dtype)
            offset = offset * weight + self.domain_bias_delta.to(mean.dtype)
        elif weight is not None:
            offset = offset * weight
        gain = gain if weight is None else gain * weight
        offset = offset if self.bias is None else offset + self.bias.to(mean.dtype)
        return shares @ gain, shares @ offset

    def pools(self, *, tracks: bool) -> Rule:
        """The batch, as far as one domain alone is looked at."""
        return batch_rule(tracks=tracks)

    @property
    def separate(self) -> bool:
        """Whether each domain adds to weight and bias what it learns."""
        return self.domain_weight_delta is not None

    @property
    def deltas(self) -> tuple[str, ...]:
        """What is added for each domain."""
        return ("domain_weight_delta", "domain_bias_delta") if self.separate else ()

    def started(self, state: NormState, start: Start) -> Start:
        """Let all other domains begin as the source is, too."""
        if not start.running:
            return replace(start, shell=partial(_without_others, start.shell))
        known = state.tracks and not start.fresh
        return replace(start, kept=partial(self._of_others, state)) if known else start

    def _of_others(self, state: NormState) -> dict[str, Tensor]:
        """The source's running statistics for each of the other domains."""
        held = {name: getattr(state, name) for name in RUNNING_STATISTICS}
        return {
            f"other_{name}": value.detach().expand(self.num_domains - 1, *value.shape).clone()
            for name, value in held.items()
            if value is not None
        }

    def _of_batch(
        self, mean: Tensor, var: Tensor, positions: int, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each domain in the batch, (D, C); zeros where it has none."""
        counts = shares.sum(0) * positions  # of a domain, for each channel
        weights = shares.t() * (positions / counts.clamp(min=1))[:, None]
        centre = weights @ mean
        spread = weights @ (var + (mean - shares @ centre).square())
        if self.pools_ranks:
            m2 = spread * counts[:, None]
            merged = merged_each(counts.double(), centre, m2, group=self.process_group)
            centre, spread, counts = (each.to(mean.dtype) for each in merged)
        if positions == 1 and not is_looked_at() and bool((counts == 1).any()):
            self.refuse_single_value(1, "use more samples of each domain")
        if self.training:
            self._track_each(centre, spread, counts)
        return centre, spread

    def _kept(self) -> tuple[Tensor, Tensor]:
        """The running statistics of all domains, (D, C)."""
        if self.running_mean is None or self.running_var is None:
            raise TypeError(f"{type(self).__name__} keeps no running statistics")
        return (
            torch.cat([self.running_mean[None], self.other_running_mean]),
            torch.cat([self.running_var[None], self.other_running_var]),
        )

    @torch.no_grad()
    def _track_each(self, mean: Tensor, var: Tensor, counts: Tensor) -> None:
        """Let the running statistics of the domains in the batch follow it."""
        if self.running_mean is None or self.running_var is None:
            return
        there = counts > 0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(there[0])
            self.other_num_batches_tracked.add_(there[1:])
        weight = there.to(mean.dtype)
        if self.momentum is not None:
            weight = weight * self.momentum
        elif self.num_batches_tracked is not None:
            seen = [self.num_batches_tracked[None], self.other_num_batches_tracked]
            weight = weight / torch.cat(seen).clamp(min=1).to(mean.dtype)
        unbiased = var * (counts / (counts - 1).clamp(min=1))[:, None]
        for old, new, first, others in zip(
            self._kept(),
            (mean, unbiased),
            (self.running_mean, self.running_var),
            (self.other_running_mean, self.other_running_var),
            strict=True,
        ):
            now = torch.lerp(old.to(new.dtype), new, weight[:, None])
            first.copy_(now[0])
            others.copy_(now[1:])


def _without_others(shell: Callable[[], nn.Module]) -> nn.Module:
    """A shell of a norm that keeps nothing, of no domain."""
    module = shell()
    for name in RUNNING_STATISTICS:
        setattr(module, f"other_{name}", None)
    return module
