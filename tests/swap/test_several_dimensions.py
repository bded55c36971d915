"""Norms over several dimensions at once, whose affine is not per channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from tests.swap.helpers import Snapshot, filled

SHAPE = (4, 5, 6)


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(
    ("affine", "reason"),
    [(True, "which is not per channel"), (False, "nothing tells which of these are its channels")],
)
def test_it_stays_with_the_reason(cls: type[nn.Module], affine: bool, reason: str) -> None:
    made = cls(SHAPE, elementwise_affine=affine)  # type: ignore[call-arg]
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 1), made, nn.BatchNorm2d(4)))
    before = Snapshot(model[1])
    with pytest.warns(normswap.NormSwapWarning, match=reason):
        normswap.convert(model, "gn", where="*")
    before.assert_kept(model[1], untouched=True)
    assert isinstance(model[2], nn.GroupNorm)


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
def test_begun_anew_it_may_become_another(cls: type[nn.Module]) -> None:
    made = cls(SHAPE)  # type: ignore[call-arg]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), made)
    normswap.convert(model, "gn", where="*", carry="fresh", num_groups=2)
    assert isinstance(model[1], nn.GroupNorm)
    assert model(torch.randn(2, 3, 5, 6)).shape == (2, *SHAPE)
