"""Instance normalization is torch's own, whatever computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normswap
from tests.reference.data import close, values

CLASSES = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dim", CLASSES)
def test_it_is_torchs(dim: int, batched: bool, affine: bool, tracks: bool, training: bool) -> None:
    options = {"affine": affine, "track_running_stats": tracks}
    norm = normswap.build("in", 6, dim=dim, **options).double().train(training)
    reference = CLASSES[dim](6, **options).double().train(training)
    with torch.no_grad():
        for seed, (mine, theirs) in enumerate(
            zip(norm.parameters(), reference.parameters(), strict=True)
        ):
            theirs.copy_(mine.copy_(values(6, seed=seed)))
    shape = (*((3,) if batched else ()), 6, 5, 4, 3)[: dim + 1 + batched]
    x = values(*shape).requires_grad_()
    other = copy.deepcopy(x)
    direction = values(*shape, seed=9)
    y, expected = norm(x), reference(other)
    close(y, expected)
    y.backward(direction), expected.backward(direction)
    close(x.grad, other.grad)
    for mine, theirs in zip(norm.parameters(), reference.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    for mine, theirs in zip(norm.buffers(), reference.buffers(), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 6, 4), (2, 6, 3, 3, 3)], ids=str)
def test_other_shapes_are_refused_as_torch_does(shape: tuple[int, ...]) -> None:
    for norm in (nn.InstanceNorm2d(6, affine=True), normswap.build("in", 6)):
        with pytest.raises(ValueError, match=r"num_features \(6\)|expected 3D or 4D"):
            norm(torch.zeros(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_it_is_as_exact_as_torchs(mean: float, layout: torch.memory_format) -> None:
    x = (values(2, 6, 40, 40) + mean).float().to(memory_format=layout)
    expected = nn.InstanceNorm2d(6)(x.double())
    off = (normswap.build("in", 6)(x) - expected).abs().max().item()
    theirs = (nn.InstanceNorm2d(6)(x) - expected).abs().max().item()
    assert off <= 4 * theirs


def test_no_positions_are_let_through_as_in_torch() -> None:
    for shape in [(2, 6, 0, 4), (0, 6, 4, 4)]:
        assert normswap.build("in", 6, affine=False)(torch.zeros(shape)).shape == shape
