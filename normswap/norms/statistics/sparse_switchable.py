"""Sparse switchable normalization: of instance, layer and batch normalization one is left.

Shao, Meng, Li, Zhang, Li, Wang and Luo, "SSN: Learning Sparse Switchable Normalization via
SparsestMax", CVPR 2019, arXiv 1903.03793.

The shares of a `MixtureNorm` are the sparsestmax of its logits: the nearest point of the simplex
that is at least a radius away from the centre. With radius 0 that is the nearest point, sparsemax;
from sqrt(2/3) on it is a corner. The training loop lets the radius grow from 0 to 1, by
`set_radius`. A switch that has come to a corner in training stays there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.statistics.sparsestmax import at_hand, sparsestmax
from normswap.norms.statistics.switchable import UNBIASED, MixtureNorm

__all__ = ["ENTRIES", "SparseSwitchableNorm", "set_radius"]

DELTA = 1e-4


class SparseSwitchableNorm(MixtureNorm):
    """A `MixtureNorm` whose shares are the sparsestmax of the logits.

    Logits start at 0, 0 and 1 - delta, where all three have a share and learn. A start with
    delta 0 would be batch normalization for good; in half precision the default is no more than
    that, and 0.01 is.

    Args:
        num_features: C.
        delta: what the start leaves to instance and layer normalization, 0 to 1; from 1 on it
            would be even. Default 1e-4.
        **rest: as for `MixtureNorm`.

    Attributes:
        radius: (1,), see `set_radius`; starts at 0.
        mean_fixed: (1,), 1 once the shares of the mean have come to a corner in training, and
            stay there; var_fixed: likewise.
    """

    own = (*MixtureNorm.own, "radius", "mean_fixed", "var_fixed")
    radius: Tensor
    mean_fixed: Tensor
    var_fixed: Tensor

    def __init__(self, num_features: int, *, delta: float = DELTA, **rest: Any) -> None:
        super().__init__(num_features, [0.0, 0.0, 1.0 - delta], **rest)
        self.delta = delta
        self.register_buffer("radius", torch.zeros(1))
        for name in ("mean_fixed", "var_fixed"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.long))

    def shares(self, logits: Tensor) -> Tensor:
        """The sparsestmax, or the corner that the switch stays in."""
        if self.radius.is_meta and not logits.is_meta:
            return sparsestmax(logits, logits.new_zeros(1))
        if not at_hand(self.mean_fixed) or self.mean_fixed or self.var_fixed:
            fixed = torch.stack([self.mean_fixed, self.var_fixed]).to(logits.device) > 0
            logits = torch.where(fixed, _corner(logits), logits)
        return sparsestmax(logits, self.radius.to(logits))

    @torch.no_grad()
    def hold(self, shares: Tensor) -> None:
        """Hold what has come to a corner there, whatever an optimizer still does to the logits."""
        arrived = shares.count_nonzero(1) == 1
        if at_hand(shares) and not arrived.any():
            return
        for row, (logits, fixed) in enumerate(
            ((self.mean_weight, self.mean_fixed), (self.var_weight, self.var_fixed))
        ):
            fixed.copy_(arrived[row : row + 1])
            logits.copy_(torch.where(arrived[row], shares[row], logits))


def _corner(logits: Tensor) -> Tensor:
    """1 for the largest of each row and 0 for the others."""
    largest = logits.detach().argmax(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, largest, 1.0)


def set_radius(model: nn.Module, step: int, total: int) -> None:
    """Set how far from even all sparse switchable norms of a model are, before a step of training.

    Args:
        model: any module; others in it are left.
        step: how many steps were made.
        total: how many there are to be; the radius is ``step / total``.

    Raises:
        OptionError: ``total`` is not positive, or ``step`` not from 0 to ``total``.
    """
    if not 0 <= step <= total or total == 0:
        raise OptionError(f"expected a step from 0 to the total, got step {step} of {total}")
    for module in model.modules():
        if isinstance(module, SparseSwitchableNorm):
            module.radius.fill_(step / total)


def _is_delta(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


ENTRIES = (
    declared(
        SparseSwitchableNorm,
        name="ssn",
        aliases=("sparse_switchable_norm", "sparse_switchable"),
        kind="switchable_norm",
        axis="statistics",
        pooled="H·W, C × H·W per sample and N × H·W per channel, of which one will be left",
        paper="Shao et al. 2019, arXiv 1903.03793",
        options=(
            UNBIASED,
            Option("delta", DELTA, "left to the others at first", "from 0 to 1", _is_delta),
        ),
    ),
)
