"""Batches that wait for each other at a norm must not find each other's things on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import StatisticsError
from tests.reference.footprint import footprint


class Keeping(nn.Module):
    """Keeps something on itself before a norm, and reads it after."""

    def __init__(self, *, random: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.random = random
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        y = self.norm(self.kept)
        noise = torch.rand(()) if self.random else 0
        return (y + self.kept).mean((2, 3)) + noise  # type: ignore[no-any-return]


def converted(model: nn.Module) -> nn.Module:
    normswap.warmup(model, [torch.randn(16, 3, 6, 6)], progress=False)
    return normswap.convert(model, to="gn")


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


def test_forwards_that_disturb_each_other_are_refused_and_leave_all_as_it_was() -> None:
    model = converted(Keeping())
    before = footprint(model)
    with pytest.raises(StatisticsError, match=r"disturb each other.*batches=1"):
        normswap.calibrate(model, batches(3), progress=False)
    assert footprint(model) == before


def test_a_single_batch_has_no_other_to_disturb() -> None:
    report = normswap.calibrate(converted(Keeping()), batches(3), batches=1, progress=False)
    assert report.output_after <= report.output_before


def test_a_model_that_draws_random_numbers_is_not_said_to_be_disturbed() -> None:
    model = converted(Keeping(random=True))
    normswap.calibrate(model, batches(3), refine_passes=0, progress=False)


class Lends(nn.Module):
    """Sets for a while what holds for the whole process."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            return self.norm(self.conv(x)).mean((2, 3))  # type: ignore[no-any-return]
        finally:
            torch.set_default_dtype(before)


def test_what_is_set_for_a_while_is_put_back() -> None:
    model = converted(Lends())
    try:
        normswap.calibrate(model, batches(3), progress=False)
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
