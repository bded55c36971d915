"""Ghost batch normalization: how a batch is cut, and what is kept of the parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import DegeneratePooling
from tests.norms.cases import CHANNELS, affine, set_statistics, statistics
from tests.reference import formulas
from tests.reference.data import close, fill, values


def made(group_size: int) -> nn.Module:
    return set_statistics(fill(normswap.build("ghost_bn", CHANNELS, group_size=group_size)))


@pytest.mark.parametrize(
    ("samples", "group_size", "size"), [(5, 2, 2), (5, 3, 3), (6, 4, 3), (7, 3, 3), (3, 9, 3)]
)
def test_parts_are_as_even_as_they_can_be(samples: int, group_size: int, size: int) -> None:
    norm, expected = made(group_size), statistics()
    x, other = (values(samples, CHANNELS, 3, 2).requires_grad_() for _ in range(2))
    direction = values(samples, CHANNELS, 3, 2, seed=1)
    weight, bias = affine(norm)
    y, wanted = norm(x), formulas.ghost_batch_norm(other, weight, bias, expected, size)
    y.backward(direction), wanted.backward(direction)
    close(y, wanted)
    close(x.grad, other.grad)
    close(norm.weight.grad, weight.grad)
    close(norm.running_mean, expected.mean)
    close(norm.running_var, expected.var)
    assert norm.num_batches_tracked == 1


def test_a_last_part_of_one_value_joins_the_one_before() -> None:
    norm, x = made(2), values(5, CHANNELS)
    weight, bias = affine(norm)
    y = norm(x)
    for part in (slice(0, 2), slice(2, 5)):
        close(y[part], formulas.batch_norm(x[part], weight, bias))


@pytest.mark.parametrize(("samples", "group_size"), [(1, 4), (3, 1)])
def test_parts_of_one_value_are_refused(samples: int, group_size: int) -> None:
    with pytest.raises(DegeneratePooling, match="single value"):
        made(group_size)(values(samples, CHANNELS))


def test_evaluation_takes_any_batch() -> None:
    norm, x = made(4).eval(), values(1, CHANNELS)
    close(norm(x), formulas.fixed_norm(x, *affine(norm), statistics()))


def test_an_empty_batch_leaves_the_statistics() -> None:
    norm = made(2)
    assert norm(values(0, CHANNELS, 3)).shape == (0, CHANNELS, 3)
    assert torch.equal(norm.running_var, statistics().var)
    assert norm.num_batches_tracked == 0
