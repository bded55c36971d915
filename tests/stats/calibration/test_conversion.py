"""Calibration as the last step of a conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.errors import DegeneratePooling, StatisticsError, TooUnfaithful
from tests.reference.data import fill, values
from tests.reference.footprint import footprint, random_states
from tests.stats.calibration.nets import affines, batches, bits, conv_net, images, settled


class Once:
    """A loader that counts how often it is read, and can be read again."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        return iter(batches())


def converted(loader: Any, **options: Any) -> nn.Module:
    return normswap.convert(conv_net(), "gn", num_groups=2, calibrate=loader, **options)


def test_it_is_a_conversion_and_a_calibration() -> None:
    expected = normswap.convert(conv_net(), "gn", num_groups=2)
    normswap.calibrate(expected, batches())
    assert bits(converted(batches())) == bits(expected)


@pytest.mark.parametrize("once", [iter, lambda data: (batch for batch in data)])
def test_a_loader_that_is_read_only_once_loses_nothing(once: Any) -> None:
    assert bits(converted(once(batches()))) == bits(converted(batches()))


def test_the_loader_is_not_read_twice_for_nothing() -> None:
    loader = Once()
    converted(loader, example_inputs=images(2))
    assert loader.reads == 1


def test_a_shuffling_loader_leaves_the_random_state() -> None:
    model, before = conv_net(), random_states()
    loader = DataLoader(TensorDataset(images(40)), batch_size=8, shuffle=True)
    normswap.convert(model, "gn", num_groups=2, calibrate=loader)
    assert random_states() == before


def test_not_in_place() -> None:
    model = conv_net()
    before = footprint(model)
    new = normswap.convert(model, "gn", num_groups=2, calibrate=batches(), inplace=False)
    assert footprint(model) == before
    assert bits(new) == bits(converted(batches()))


def test_calibrated_is_fidelity_enough() -> None:
    model = converted(batches(), min_fidelity="calibrated")
    assert {str(row.fidelity) for row in normswap.report(model)} == {"calibrated"}
    with pytest.raises(TooUnfaithful):
        normswap.convert(conv_net(), "gn", num_groups=2, min_fidelity="calibrated")


def test_more_than_calibrated_is_refused_before_anything_is_done() -> None:
    model, loader = conv_net(), Once()
    before = footprint(model)
    with pytest.raises(TooUnfaithful):
        normswap.convert(model, "gn", num_groups=2, calibrate=loader, min_fidelity="eval")
    assert footprint(model) == before


class Unused(nn.Module):
    """Has a norm that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = conv_net(), nn.BatchNorm2d(4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_what_could_not_be_calibrated_is_not_fidelity_enough() -> None:
    model = Unused().eval()
    before = footprint(model)
    with pytest.raises(TooUnfaithful, match="unused"):
        normswap.convert(model, "gn", num_groups=2, calibrate=batches(), min_fidelity="calibrated")
    assert footprint(model) == before


def test_what_is_exact_needs_no_data() -> None:
    model = normswap.convert(conv_net(), "frozen_bn", calibrate=batches())
    assert {str(row.fidelity) for row in normswap.report(model)} <= {"exact", "eval", "near"}


def test_only_what_this_conversion_makes_is_fitted() -> None:
    model = normswap.convert(conv_net(), "gn", where="1", num_groups=2)
    before = copy.deepcopy(model[1].state_dict())
    normswap.convert(model, "gn", where="4", num_groups=2, calibrate=batches())
    assert all(torch.equal(before[name], t) for name, t in model[1].state_dict().items())
    told = {row.path: str(row.fidelity) for row in normswap.report(model)}
    assert told == {"1": "matched", "4": "calibrated"}


def test_twice_is_once() -> None:
    model = converted(batches())
    before = bits(model)
    normswap.convert(model, "gn", num_groups=2, where="*", calibrate=batches())
    assert bits(model) == before


def test_pooling_over_one_value_shows_by_the_first_batch() -> None:
    net = settled(fill(nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4))), images(40))
    before = footprint(net)
    with pytest.raises((DegeneratePooling, normswap.NormSwapError)) as error:
        normswap.convert(net, "in", strict=True, calibrate=batches())
    assert "single value" in str(error.value)
    assert footprint(net) == before


class Called(nn.Module):
    """Normalizes by a call, and by a module if there is to be one."""

    def __init__(self, *, module: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6).double() if module else None

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x, (6,))
        return y if self.norm is None else self.norm(x) * y


def test_what_cannot_be_fitted_takes_the_conversion_back() -> None:
    model = Called(module=False)
    before = footprint(model)
    with pytest.raises(StatisticsError, match="a call in a forward"):
        normswap.convert(model, "rms", where="*", calibrate=[values(4, 6)])
    assert footprint(model) == before
    assert type(model) is Called


def test_a_call_is_not_fidelity_enough() -> None:
    model = Called(module=True)
    before = footprint(model)
    with pytest.raises(TooUnfaithful, match="functional"):
        normswap.convert(
            model, "rms", where="*", calibrate=[values(4, 6)], min_fidelity="calibrated"
        )
    assert footprint(model) == before
    normswap.convert(model, "rms", where="*", calibrate=[values(4, 6)])
    assert sorted(str(row.fidelity) for row in normswap.report(model)) == ["affine", "calibrated"]


def test_dict_batches_serve_as_example_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.net(pixels)

    data = [{"pixels": x, "labels": torch.zeros(8)} for x in batches()]
    model = normswap.convert(Named().eval(), "gn", num_groups=2, calibrate=data)
    assert all(
        torch.equal(a, b)
        for a, b in zip(affines(model), affines(converted(batches())), strict=True)
    )
