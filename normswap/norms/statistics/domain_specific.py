"""Batch normalization by domain.

Chang, You, Seo, Kwak and Han, "Domain-Specific Batch Normalization for Unsupervised Domain
Adaptation", CVPR 2019, arXiv 1906.03950.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from normswap.norms.declared import declared
from normswap.norms.entry import AFFINE, whole
from normswap.norms.inputs.kinds import ExtraInput, Form
from normswap.norms.pool import NOTHING
from normswap.norms.start import Carry
from normswap.norms.state import NormState
from normswap.norms.statistics.domain import DomainNorm

__all__ = ["ENTRIES", "DomainSpecificBatchNorm"]


class DomainSpecificBatchNorm(DomainNorm):
    """Batch normalization by domain: statistics and affine of each sample's own.

    Args:
        num_features: C.
        num_domains: D. Default 2.
        **rest: as for `MeasuredNorm`.
    """

    def __init__(self, num_features: int, *, num_domains: int = 2, **rest: Any) -> None:
        super().__init__(num_features, num_domains=num_domains, **rest)

    @classmethod
    def chosen(
        cls, state: NormState, carry: Carry, *, affine: bool | None = None, **given: Any
    ) -> dict[str, Any]:
        """An affine for each domain where there is one at all."""
        usual = state.affine or state.rule.eval == NOTHING
        made = super().chosen(state, carry, **given)
        return made | {"separate": usual if affine is None else affine}

    def settings(self, names: Iterable[str]) -> dict[str, object]:
        """The number of domains, and whether there is an affine."""
        return {"num_domains": self.num_domains, "affine": self.weight is not None}

    @property
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """The domain of each sample, or of all."""
        forms = Form(("N",), "integers", self.num_domains), Form((), "integers", self.num_domains)
        return (ExtraInput("domain", forms, 0, required=False),)

    def shares(self, mean: Tensor) -> Tensor:
        """The domain that each sample is said to be of."""
        return self.shares_of("domain", self.num_domains, mean)


ENTRIES = (
    declared(
        DomainSpecificBatchNorm,
        name="dsbn",
        aliases=("domain_specific_batch_norm", "domain_specific_bn"),
        kind="batch_norm",
        axis="statistics",
        pooled="N × H·W of one domain, per channel",
        paper="Chang et al. 2019, arXiv 1906.03950",
        options=(whole("num_domains", 2, "how many there are"), AFFINE),
        inputs=("domain",),
    ),
)
