"""Cross-iteration batch normalization: the statistics of the last few batches, brought up to date.

Yao, Cao, Zheng, Huang and Lin, "Cross-Iteration Batch Normalization", CVPR 2021, arXiv 2002.05712.

A channel's mean and variance were taken with the weights of their time. Those of earlier batches
are brought to the present weights by the first terms of their Taylor series in the weight of the
convolution or linear that feeds the norm, and averaged with the present batch's, which alone carry
gradients. What earlier layers have changed is neglected, as in the paper.

The derivatives are those of the layer as a linear map: no second pass through autograd is made, so
that it works under checkpointing too, where the recomputation of a batch is told by its being the
same to the bit. Variances are kept where the paper keeps mean squares, and a predicted variance
below zero counts as zero, which is the paper's rule that a mean square is no less than the square
of the mean. History is no part of the state dict, being three times the layer's weight for every
batch: after loading it fills again. ``torch.compile`` breaks its graph here in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normswap.errors import CannotConvert, NormSwapError
from normswap.norms.beside import Remade
from normswap.norms.declared import declared
from normswap.norms.entry import Option, flag
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import RUNNING, Over, Pool, Rule
from normswap.norms.remake import Mixin, why_not
from normswap.norms.start import Start
from normswap.norms.state import NormState
from normswap.norms.statistics.predicted import PastBatch, derivatives
from normswap.norms.sync import merged

__all__ = ["ENTRIES", "CrossIterationBatchNorm", "HandingOn"]

BUFFER_NUM = 3
BURNIN = 8

#: The attribute of a layer's output that is what the layer was given.
_FED = "_normswap_fed"


class HandingOn(Mixin):
    """A convolution or linear whose output says in training what the layer was given."""

    transparent = True

    def forward(self: Any, input: Tensor) -> Tensor:
        """Apply the layer as it is."""
        y: Tensor = super().forward(input)  # type: ignore[misc]
        if self.training:
            setattr(y, _FED, input.detach())
        return y


@dataclass(frozen=True)
class _Across(Pool):
    """The batch and those before, or what was kept; eps may stand outside of the root.

    Args:
        batches: how many count.
        outside: where eps stands.
    """

    over: Over = "batch"
    batches: int = 1 + BUFFER_NUM
    outside: bool = False

    @property
    def by_channel(self) -> bool:
        """Not where it divides by something else than the statistics tell."""
        return super().by_channel and not self.outside

    def divisor(self, var: Tensor, eps: float) -> Tensor:
        """What it divides by."""
        return var.sqrt() + eps if self.outside else super().divisor(var, eps)


class CrossIterationBatchNorm(MeasuredNorm):
    """weight · (x - M) / sqrt(V + eps) + bias, with M and V of this batch and the last few.

    Running statistics follow this batch's, as those of batch normalization.

    Args:
        num_features: C.
        buffer_num: how many batches before this one count. Default 3, as in the authors' code.
        burnin: for how many weights of the layer before it, which is to say steps of training, it
            is a batch norm first. Default 8, likewise.
        drop_negative: leave a batch out of a channel whose predicted variance is below zero, as
            the authors' code does, instead of counting it as zero. Default no.
        eps_outside: add eps to the root, not under it, as the authors' code does. Default no.
        **rest: as for `MeasuredNorm`.

    Attributes:
        producer: the layer that feeds it; no child.
        iterations: a long scalar, how many weights it has seen until it was burnt in.
        history: the last batches.
    """

    own = ("producer", "iterations", "history")
    references = ("producer",)
    producer: Any = None
    iterations: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        buffer_num: int = BUFFER_NUM,
        burnin: int = BURNIN,
        drop_negative: bool = False,
        eps_outside: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(num_features, **rest)
        self.buffer_num = buffer_num
        self.burnin = burnin
        self.drop_negative = drop_negative
        self.eps_outside = eps_outside
        self.register_buffer("iterations", torch.tensor(0, dtype=torch.long))
        self.history: tuple[PastBatch, ...] = ()
        self._burning = True
        self._last_weight: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input; in training it has to be the layer's output itself."""
        # In a statistics pass the layer before is in eval mode, and batches are each alone.
        trains = self.training and self.producer is not None and self.producer.training
        across = trains and self.buffer_num > 0 and not self.plain_statistics
        y: Tensor = self._across(input) if across and self._is_burnt() else super().forward(input)
        return y

    def _is_burnt(self) -> bool:
        """Count a weight of the layer before; whether there were enough of them.

        A forward that is computed again for backward has the weight that it had.
        """
        if self._burning:
            weight, last = self.producer.weight.detach(), self._last_weight
            if last is None or not torch.equal(last.to(weight), weight):
                self.iterations.add_(1)
                self._last_weight = weight.clone()
            self._burning = bool(self.iterations <= self.burnin)
            if not self._burning:
                self._last_weight = None
        return not self._burning

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _across(self, input: Tensor) -> Tensor:
        """Normalize by this batch and those before."""
        fed = getattr(input, _FED, None)
        if fed is None:
            raise NormSwapError(
                f"{self.called}: in training it takes the output of the layer before it as it is, "
                "and this is another tensor; leave it out by skip="
            )
        self._seen = fed, input.detach()
        try:
            y: Tensor = super().forward(input)
        finally:
            self._seen = None
        return y

    def rule(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Average the batch's statistics with those predicted for the batches before."""
        centre, spread = self.over_batch(mean, var, positions)
        if self._seen is not None and (len(mean) or self.pools_ranks):
            centre, spread = self._averaged(centre, spread, *self._seen)
        gain = 1 / (spread.sqrt() + self.eps) if self.eps_outside else (spread + self.eps).rsqrt()
        return self.with_affine(gain, -gain * centre)

    def _averaged(
        self, centre: Tensor, spread: Tensor, fed: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean of all batches' statistics; this batch is remembered for those to come."""
        layer, past, most = self.producer, self.history, self.buffer_num
        with torch.no_grad():
            version = layer.weight._version
            # A recomputation for backward sees what the forward saw, and is no further batch.
            again = bool(past) and past[-1].version == version
            again = again and torch.equal(past[-1].mean, centre)
            if again:
                past = past[:-1]
            else:
                found = self._over_ranks(*derivatives(layer, fed, output, centre), output)
                bias = None if layer.bias is None else layer.bias.detach().to(centre).clone()
                weight = layer.weight.detach().to(centre).clone()
                this = PastBatch(centre, spread, *found, weight, bias, version).detached()
                # One more than count now: a recomputation leaves itself out.
                self.history = (*past, this)[-1 - most :]
            before = [each.by(layer) for each in past[-most:]]
        means = torch.stack([centre, *(mean for mean, _ in before)])
        variances = torch.stack([spread, *(var for _, var in before)])
        shares = torch.ones_like(variances)
        if self.drop_negative:
            shares[1:] = (variances[1:] >= 0).to(shares)
        shares = shares / shares.sum(0)
        whole = (shares * means).sum(0)
        between = (shares * (means - whole).square()).sum(0)
        return whole, (shares * variances.clamp(min=0)).sum(0) + between

    def _over_ranks(self, dmean: Tensor, dvar: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives by the batch of all ranks, if that is what is pooled."""
        if not self.pools_ranks:
            return dmean, dvar
        flat = torch.stack([dmean, dvar]).flatten()
        count, none = output.numel() // self.num_features, torch.zeros_like(flat)
        whole, _, _ = merged(count, flat, none, group=self.process_group, name=self.called)
        first, second = whole.to(dmean.dtype).view(2, *dmean.shape)
        return first, second

    def pools(self, *, tracks: bool) -> Rule:
        """This batch and those before; in eval mode the running statistics."""
        outside = self.eps_outside
        across = _Across(batches=1 + self.buffer_num, outside=outside)
        if not tracks:
            return Rule.always(across)
        return Rule(across, _Across("running", batches=0, outside=True) if outside else RUNNING)

    def started(self, state: NormState, start: Start) -> Start:
        """Let the layer before tell what it was given.

        Raises:
            CannotConvert: no convolution or linear feeds the norm alone.
        """
        layer = state.producer.module
        problem = why_not(state.producer)
        if not problem and layer is not None and (layer._backward_hooks or layer._forward_hooks):
            problem = f"a hook on {state.producer.path} stands between the two"
        if problem or layer is None:
            raise CannotConvert(
                f"its statistics follow the weight of the layer that feeds it: {problem}",
                'leave it out by skip=, or use to="bn"',
            )
        remade = Remade(layer, HandingOn)
        return replace(
            start.noted(f"follows the weight of {state.producer.path}"),
            beside=(*start.beside, remade),
        )

    def settle(self, state: NormState) -> None:
        """Refer to the layer before."""
        self.refer_to(producer=state.producer.module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Where the model moves, what batches before have left stays behind.
        self.history = ()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._burning = True  # until what is loaded is looked at
        self.history, self._last_weight = (), None
        super()._load_from_state_dict(*args, **kwargs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


ENTRIES = (
    declared(
        CrossIterationBatchNorm,
        name="cbn",
        aliases=("cross_iteration_bn", "cross_iteration_batch_norm"),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W per channel, of this batch and the last few",
        paper="Yao et al. 2021, arXiv 2002.05712",
        options=(
            Option("buffer_num", BUFFER_NUM, "batches before this one", "0 or more", _is_count),
            Option("burnin", BURNIN, "training steps as batch norm first", "0 or more", _is_count),
            flag(
                "drop_negative",
                False,
                "predicted variances below zero do not count, as in the paper's code",
            ),
            flag("eps_outside", False, "eps beside the root, as the paper's code"),
        ),
        needs=("neighbours",),
    ),
)
