"""Pooled statistics against all values at once, and their gradients, of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normswap.norms.pooled import pooled
from tests.reference.data import close, values

each_dim = pytest.mark.parametrize("dim", [0, 1, 2])


def parts(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means, which take gradients, and variances."""
    return values(3, 4, 2, seed=seed).requires_grad_(), values(3, 4, 2, seed=seed + 1).square()


@each_dim
def test_they_are_those_of_all_values(dim: int) -> None:
    x = values(3, 4, 2, 5) + 100
    centre, spread = pooled(x.mean(3), x.var(3, correction=0), dim)
    wanted = x.mean((dim, 3)), x.var((dim, 3), correction=0)
    if dim:  # what is pooled over samples goes beside them as it is
        wanted = wanted[0].unsqueeze(dim), wanted[1].unsqueeze(dim)
    close(centre, wanted[0])
    close(spread, wanted[1])


@each_dim
def test_gradients_are_those_of_the_formula(dim: int) -> None:
    mean, var = parts()
    var.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: pooled(m, v, dim), (mean, var))
    assert torch.autograd.gradgradcheck(lambda m, v: pooled(m, v, dim), (mean, var))


def test_the_plain_formula_is_the_same() -> None:
    mean, var = parts()

    def total(m: Tensor, v: Tensor) -> Tensor:
        centre, spread = pooled(m, v, 1)
        return (centre * spread).sum()

    by_hand = torch.autograd.grad(total(mean, var.requires_grad_()), (mean, var))
    plain = torch.func.grad(total, argnums=(0, 1))(mean.detach(), var.detach())
    for one, other in zip(by_hand, plain, strict=True):
        close(one, other)


def test_the_default_device_is_no_matter() -> None:
    mean, var = parts()
    expected = pooled(mean, var, 1)
    with torch.device("meta"):
        found = pooled(mean, var, 1)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
