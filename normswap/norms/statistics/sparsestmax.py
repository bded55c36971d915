"""The sparsestmax of some logits: the nearest point of the simplex away from its centre.

Shao, Meng, Li, Zhang, Li, Wang and Luo, "SSN: Learning Sparse Switchable Normalization via
SparsestMax", CVPR 2019, arXiv 1903.03793.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.moments import should_be_plain

__all__ = ["at_hand", "sparsestmax"]

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
    if at_hand(logits):
        # Few numbers are told faster by Python than by operations.
        point: Tensor = _Point.apply(logits, radius)
        return point
    return _point(logits, *_by_operations(logits.detach(), radius))


def at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at, at no cost."""
    return tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter) and not should_be_plain()


class _Point(torch.autograd.Function):
    """logits, radius -> the points, by numbers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, radius: Tensor) -> Tensor:
        radii = radius.expand(*logits.shape[:-1], 1).flatten().tolist()
        ctx.rows = [
            _Row.pushed(row, far * far) for row, far in zip(_rows(logits), radii, strict=True)
        ]
        ctx.save_for_backward(logits)
        return logits.new_tensor([row.point() for row in ctx.rows]).reshape(logits.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() or _stands_for_several(grads[0]):
            return _by_formula(ctx.saved_tensors[0], ctx.rows, grads[0]), None
        made = [row.gradient(grad) for row, grad in zip(ctx.rows, _rows(grads[0]), strict=True)]
        return grads[0].new_tensor(made).reshape(grads[0].shape), None


def _rows(tensor: Tensor) -> list[list[float]]:
    rows: list[list[float]] = tensor.reshape(-1, tensor.shape[-1]).tolist()
    return rows


def _stands_for_several(grad: Tensor) -> bool:
    """Whether it is a gradient of several, as by ``is_grads_batched``, and has no numbers."""
    try:
        grad.data_ptr()
    except RuntimeError:
        return True
    return False


@dataclass(frozen=True)
class _Row:
    """Some logits, and what `_by_operations` tells of them.

    Args:
        logits: (K,).
        face: whether each is on the face on which the point ends.
        pushed_face: whether each is on the face on which it was pushed furthest.
        reach: how far that is from the face's centre, squared; 0 where nothing is pushed.
    """

    logits: list[float]
    face: list[bool]
    pushed_face: list[bool]
    reach: float

    @classmethod
    def pushed(cls, logits: list[float], squared: float) -> _Row:
        """Push some logits, given the radius squared.

        Pushing on a face is stretching the logits, and the point is the nearest to these: the
        further they are stretched, the fewer corners are left, always those of the largest logits.
        """
        falling = sorted(logits, reverse=True)
        # A corner is left while its lead is less than 1, stretched.
        leads = [sum(larger - each for larger in falling[:i]) for i, each in enumerate(falling)]
        first = sum(lead < 1 for lead in leads)
        stretch, corners, furthest, reach = 1.0, first, 1, 0.0
        for _ in falling[1:]:
            mean = sum(falling[:corners]) / corners
            distance = sum((each - mean) ** 2 for each in falling[:corners])
            room = squared + 1 / first - 1 / corners
            if distance > TINY**2 and room > stretch * stretch * distance:
                stretch, furthest, reach = math.sqrt(room / distance), corners, room
                corners = sum(stretch * lead < 1 for lead in leads)
        least, pushed = falling[corners - 1], falling[furthest - 1]
        return cls(logits, [x >= least for x in logits], [x >= pushed for x in logits], reach)

    def point(self) -> list[float]:
        """The point."""
        stretch, even = self._stretch()[0], 1 / (sum(self.face) or math.nan)
        away = _less_mean(self.logits, self.face)
        return [even * on + stretch * x for x, on in zip(away, self.face, strict=True)]

    def gradient(self, grad: list[float]) -> list[float]:
        """The logits' gradient, of the point's."""
        stretch, distance = self._stretch()
        away, outwards = (
            _less_mean(self.logits, self.face),
            _less_mean(self.logits, self.pushed_face),
        )
        along = sum(g * x for g, x in zip(grad, away, strict=True))
        slope = along * self.reach / (stretch * distance * distance)
        inner = _less_mean(grad, self.face)
        return [stretch * g - slope * x for g, x in zip(inner, outwards, strict=True)]

    def _stretch(self) -> tuple[float, float]:
        """What brings logits as far away as the reach, and their distance squared."""
        if not self.reach > 0:
            return 1.0, 1.0
        distance = sum(x * x for x in _less_mean(self.logits, self.pushed_face))
        return math.sqrt(self.reach / distance), distance


def _less_mean(values: list[float], face: list[bool]) -> list[float]:
    """How values differ from their mean on a face, and zero elsewhere; NaN spreads."""
    pairs = list(zip(values, face, strict=True))
    mean = sum(on * value for value, on in pairs) / (sum(face) or math.nan)
    return [on * (value - mean) for value, on in pairs]


def _by_formula(logits: Tensor, rows: list[_Row], grad: Tensor) -> Tensor:
    """The logits' gradient by autograd, which can be differentiated again."""
    faces, pushed = ([getattr(row, name) for row in rows] for name in ("face", "pushed_face"))
    face, beyond = (logits.new_tensor(each).reshape(logits.shape) for each in (faces, pushed))
    reach = logits.new_tensor([row.reach for row in rows]).reshape(*logits.shape[:-1], 1)
    with torch.enable_grad():
        point = _point(logits, face, beyond, reach)
    (found,) = torch.autograd.grad(point, logits, grad, create_graph=True)
    return found


def _by_operations(logits: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On which face the point ends, on which it was pushed furthest, and how far, squared.

    Faces are ones and zeros. The numbers are not looked at. All that is needed of a face is known
    beforehand, in a row for the smallest logit that it may have.
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
    """The point, of what `_by_operations` tells."""
    pushes, away = reach > 0, _away(logits, pushed)
    distance = torch.where(pushes, away.square().sum(-1, keepdim=True), 1.0)
    stretch = torch.where(pushes, reach / distance, 1.0).sqrt()
    return torch.addcmul(face / face.sum(-1, keepdim=True), _away(logits, face), stretch)


def _away(logits: Tensor, face: Tensor) -> Tensor:
    """How logits differ from their mean on a face, and zero elsewhere."""
    mean = (face * logits).sum(-1, keepdim=True) / face.sum(-1, keepdim=True)
    return face * (logits - mean)
