"""A calibration that fails, or is refused, leaves all as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, StatisticsError
from tests.reference.footprint import footprint, random_states
from tests.stats.calibration.nets import (
    batches,
    conv_net,
    images,
    pair_of,
)


class Planned(Exception):
    """Raised on purpose."""


class Fuse:
    """Fails at its so-manyth call, and from then on."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.left, self.error = calls, error

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.left -= 1
        torch.rand(1)
        if self.left <= 0:
            raise self.error("on purpose")
        return model(x)

    def __deepcopy__(self, memo: Any) -> Fuse:
        return self


class Fused(nn.Module):
    """A net with a fuse."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        super().__init__()
        self.net, self.fuse = conv_net(), Fuse(calls, error)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.net, x)


#: Forwards of the fit, of the differences before it, and of each later part, for five batches.
CALLS = [1, 2, 7, 10, 11, 13, 14, 18, 20, 30]


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("calls", CALLS)
def test_a_failing_model_leaves_all_as_it_was(calls: int, error: type[BaseException]) -> None:
    model, _ = pair_of(conv_net())
    before, states = footprint(model), random_states()
    with pytest.raises(error):
        normswap.calibrate(model, batches(), forward=Fuse(calls, error))
    assert footprint(model) == before
    assert random_states() == states


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("calls", CALLS)
def test_a_failing_conversion_leaves_all_as_it_was(calls: int, error: type[BaseException]) -> None:
    model = normswap.convert(Fused(calls, error).eval(), "ln")
    before, states = footprint(model), random_states()
    with pytest.raises(error):
        normswap.convert(
            model, "gn", num_groups=2, where="*", calibrate=batches(), example_inputs=images(2)
        )
    assert footprint(model) == before
    assert random_states() == states


def ends_badly(error: type[BaseException]) -> Iterator[Tensor]:
    yield from batches(3)
    raise error("on purpose")


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
def test_a_failing_loader_leaves_all_as_it_was(error: type[BaseException]) -> None:
    model, original = pair_of(conv_net())
    before, source = footprint(model), footprint(original)
    with pytest.raises(error):
        normswap.calibrate(model, ends_badly(error))
    with pytest.raises(error):
        normswap.convert(original, "gn", num_groups=2, calibrate=ends_badly(error))
    assert footprint(model) == before
    assert footprint(original) == source


@pytest.mark.parametrize("place", [0, 2, 4])
def test_data_that_is_not_finite_is_refused(place: int) -> None:
    model, _ = pair_of(conv_net())
    before, data = footprint(model), batches()
    data[place][0, 0, 0, 0] = torch.nan
    with pytest.raises(StatisticsError, match=f"1: .*not finite in batch {place}"):
        normswap.calibrate(model, data)
    assert footprint(model) == before


def test_no_data_is_refused() -> None:
    model, original = pair_of(conv_net())
    before = footprint(model)
    for nothing in ([], iter([]), [images(1)[:0]]):
        with pytest.raises(StatisticsError, match="no sample"):
            normswap.calibrate(model, nothing)
    assert footprint(model) == before
    source = footprint(original)
    with pytest.raises(StatisticsError, match="no batch"):
        normswap.convert(original, "gn", calibrate=[])
    assert footprint(original) == source


def test_what_was_never_converted_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"call normswap\.convert first"):
        normswap.calibrate(conv_net(), batches())


def test_arguments_that_mean_nothing_are_refused() -> None:
    model, _ = pair_of(conv_net())
    with pytest.raises(OptionError, match="method='best'"):
        normswap.calibrate(model, batches(), method="best")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="refine_passes=-1"):
        normswap.calibrate(model, batches(), refine_passes=-1)


def spoils_gradients(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sigmoid().mul_(2)


def test_a_model_that_cannot_be_run_with_gradients_says_what_to_do() -> None:
    model, _ = pair_of(conv_net())
    before = footprint(model)
    with pytest.raises(StatisticsError, match="refine_passes=0"):
        normswap.calibrate(model, batches(), forward=spoils_gradients)
    assert footprint(model) == before
    normswap.calibrate(model, batches(), forward=spoils_gradients, refine_passes=0)
