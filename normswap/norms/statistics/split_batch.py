"""Batch normalization in which unlabelled samples do not disturb the labelled ones.

Zając, Żołna and Jastrzębski, "Split Batch Normalization: Improving Semi-Supervised Learning under
Domain Shift", 2019, arXiv 1904.03515.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.start import Carry
from normswap.norms.state import NormState
from normswap.norms.statistics.domain import DomainNorm

__all__ = ["ENTRIES", "SplitBatchNorm"]

_AFFINES = ("shared", "separate")


class SplitBatchNorm(DomainNorm):
    """Batch normalization in which unlabelled samples have statistics of their own in training.

    In eval mode all are normalized as the labelled ones.

    Args:
        num_features: C.
        separate: whether the two have an affine of their own, too. Default no.
        **rest: as for `MeasuredNorm`.
    """

    def __init__(self, num_features: int, *, separate: bool = False, **rest: Any) -> None:
        super().__init__(num_features, num_domains=2, separate=separate, **rest)

    @classmethod
    def chosen(
        cls, state: NormState, carry: Carry, *, affine: str = _AFFINES[0], **given: Any
    ) -> dict[str, Any]:
        """An affine for both, or for each."""
        return super().chosen(state, carry, **given) | {"separate": affine == "separate"}

    def settings(self, names: Iterable[str]) -> dict[str, object]:
        """Whose the affine is."""
        return {"affine": _AFFINES[self.separate]}

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """Whether each sample is labelled."""
        return (ExtraInput("labelled", (Form(("N",), "zeros and ones"),), required=False),)

    def shares(self, mean: Tensor) -> Tensor:
        """Domain 0 for labelled samples, 1 for the others."""
        call, labelled = self.called_with("labelled", mean)
        everything = labelled is None or not self.training

        def make() -> Tensor:
            if everything:
                index = torch.zeros(len(mean), dtype=torch.long, device=mean.device)
            else:
                index = (labelled == 0).long()
            return F.one_hot(index, 2).to(mean.dtype)

        key = ("split", everything, len(mean), mean.dtype, mean.device)
        return call.once(key, make)


ENTRIES = (
    declared(
        SplitBatchNorm,
        name="split_bn",
        aliases=("split_batch_norm",),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W of the labelled or of the other samples, per channel",
        paper="Zając et al. 2019, arXiv 1904.03515",
        options=(
            Option(
                "affine",
                "shared",
                "of labelled samples and others: shared, separate",
                '"shared" or "separate"',
                lambda value: value in _AFFINES,
            ),
        ),
        inputs=("labelled",),
    ),
)
