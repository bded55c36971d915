"""Sparse switchable normalization: of instance, layer and batch normalization one is left.

Shao, Meng, Li, Zhang, Li, Wang and Luo, "SSN: Learning Sparse Switchable Normalization via
SparsestMax", CVPR 2019, arXiv 1903.03793.

The shares of a `MixtureNorm` are the sparsestmax of its logits: the nearest point of the simplex
that is at least a radius away from the centre. With radius 0 that is the nearest point, sparsemax;
from sqrt(2/3) on it is a corner. The training loop lets the radius grow from 0 to 1, by
`set_radius`. A switch that has come to a corner in training stays there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import OptionError
from normswap.norms.declared import declared
from normswap.norms.entry import Option
from normswap.norms.moments import should_be_plain
from normswap.norms.switchable import UNBIASED, MixtureNorm

__all__ = ["ENTRIES", "SparseSwitchableNorm", "set_radius", "sparsestmax"]

DELTA = 1e-4

#: Logits that differ by less than this have no direction to be pushed apart in.
TINY = 1e-7


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """The point of the simplex nearest to some logits, at least a radius from the centre.

    The centre is that of the face on which the nearest point lies. What pushing outwards would
    make negative becomes zero, and the rest is pushed on within its own face, to the same sum of
    squares. The gradient is that of pushing and projecting, where the faces and centres are
    constant; at a corner it is zero. Logits that are equal are not pushed.

    Args:
        logits: (..., K).
        radius: what broadcasts against (..., 1).

    Returns:
        (..., K), not negative, of sum 1.
    """
    if should_be_plain():
        return _point(logits, *_by_operations(logits.detach(), radius))
    # Where numbers are at hand, few of them are told faster by Python than by operations.
    at_hand = logits.is_cpu and type(logits) is Tensor
    point: Tensor = _Point.apply(
        logits, *(_by_numbers if at_hand else _by_operations)(logits.detach(), radius)
    )
    return point


def _by_numbers(logits: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On which face the point ends, on which it was pushed furthest, and how far, squared.

    Pushing on a face is stretching the logits, and the point is the nearest to these: the further
    they are stretched, the fewer corners are left, always those of the largest logits. Faces are
    ones and zeros. Where nothing is pushed the last two mean nothing but ``reach`` 0.
    """
    rows = logits.reshape(-1, logits.shape[-1]).tolist()
    radii = radius.expand(*logits.shape[:-1], 1).flatten().tolist()
    told = []
    for row, far in zip(rows, radii, strict=True):
        least, furthest, reach = _pushed(sorted(row, reverse=True), far * far)
        told.append([*(x >= least for x in row), *(x >= furthest for x in row), reach])
    size = logits.shape[-1]
    made = logits.new_tensor(told).reshape(*logits.shape[:-1], 2 * size + 1)
    return made[..., :size], made[..., size : 2 * size], made[..., 2 * size :]


def _pushed(logits: list[float], squared: float) -> tuple[float, float, float]:
    """The smallest logits of both faces and the reach, of logits in descending order."""
    # A corner is left while its lead is less than 1, stretched.
    leads = [sum(larger - each for larger in logits[:i]) for i, each in enumerate(logits)]
    first = sum(lead < 1 for lead in leads)
    stretch, corners, furthest, reach = 1.0, first, 1, 0.0
    for _ in logits[1:]:
        mean = sum(logits[:corners]) / corners
        distance = sum((each - mean) ** 2 for each in logits[:corners])
        room = squared + 1 / first - 1 / corners
        if distance > TINY**2 and room > stretch * stretch * distance:
            stretch, furthest, reach = math.sqrt(room / distance), corners, room
            corners = sum(stretch * lead < 1 for lead in leads)
    return logits[corners - 1], logits[furthest - 1], reach


def _by_operations(logits: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where the numbers are not at hand, without a look at them.

    All that is needed of a face is known beforehand, in a row for the smallest logit that it may
    have.
    """
    ahead = (logits.unsqueeze(-2) - logits.unsqueeze(-1)).clamp(min=0)
    lead = ahead.sum(-1)
    share = 1 / (logits.unsqueeze(-2) >= logits.unsqueeze(-1)).sum(-1, dtype=logits.dtype)
    # From the smallest logit of each face on, so that no digits are lost.
    distance = ahead.square().sum(-1) - lead.square() * share
    smallest = torch.where(lead < 1, share, 1.0).amin(-1, keepdim=True)
    reach = (radius.square() + smallest - share).clamp(min=0)
    stretches = torch.where(distance > TINY**2, reach / distance, 0.0).sqrt()
    stretch, furthest = torch.ones_like(smallest), torch.zeros_like(smallest, dtype=torch.long)
    for _ in range(logits.shape[-1] - 1):
        row = torch.where(stretch * lead < 1, share, 2.0).argmin(-1, keepdim=True)
        further = stretches.gather(-1, row)
        furthest = torch.where(further > stretch, row, furthest)
        stretch = torch.maximum(stretch, further)
    face, pushed = stretch * lead < 1, logits >= logits.gather(-1, furthest)
    reach = torch.where(stretch > 1, reach.gather(-1, furthest), 0.0)
    return face.to(logits.dtype), pushed.to(logits.dtype), reach


def _point(logits: Tensor, face: Tensor, pushed: Tensor, reach: Tensor) -> Tensor:
    """The point, of what `_pushed` tells."""
    stretch, _ = _stretched(_away(logits, pushed), reach)
    return torch.addcmul(face / face.sum(-1, keepdim=True), _away(logits, face), stretch)


def _stretched(away: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """What brings logits as far away as the reach, and their distance squared; 1 where it is 0."""
    pushes = reach > 0
    distance = torch.where(pushes, away.square().sum(-1, keepdim=True), 1.0)
    return torch.where(pushes, reach / distance, 1.0).sqrt(), distance


def _away(logits: Tensor, face: Tensor) -> Tensor:
    """How logits differ from their mean on a face, and zero elsewhere."""
    mean = (face * logits).sum(-1, keepdim=True) / face.sum(-1, keepdim=True)
    return face * (logits - mean)


class _Point(torch.autograd.Function):
    """`_point`, with its gradient written by hand: on so few values operations are what costs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, face: Tensor, pushed: Tensor, reach: Tensor) -> Tensor:
        ctx.save_for_backward(logits, face, pushed, reach)
        return _point(logits, face, pushed, reach)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, face, pushed, reach = ctx.saved_tensors
        outwards = _away(logits, pushed)
        stretch, distance = _stretched(outwards, reach)
        along = (grads[0] * _away(logits, face)).sum(-1, keepdim=True)
        slope = along * reach / (stretch * distance.square())
        return _away(grads[0], face) * stretch - slope * outwards, None, None, None


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
        fixed = torch.stack([self.mean_fixed, self.var_fixed]).to(logits.device) > 0
        logits = torch.where(fixed, _corner(logits), logits)
        return sparsestmax(logits, self.radius.to(logits))

    @torch.no_grad()
    def hold(self, shares: Tensor) -> None:
        """Hold what has come to a corner there, whatever an optimizer still does to the logits."""
        arrived = shares.count_nonzero(1) == 1
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
