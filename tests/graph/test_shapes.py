"""What example inputs tell: the shape of a norm's input at every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.graph.models import CHANNELS, Around, Branching, Masked, block, image


def test_the_shape_of_the_input_is_told() -> None:
    (site,) = normswap.find(block(), torch.ones(5, CHANNELS, 7, 6))
    assert site.input_shape == (5, CHANNELS, 7, 6)


def test_without_example_inputs_no_shape_is_told() -> None:
    (site,) = normswap.find(block())
    assert (site.input_shape, site.input_shapes) == (None, None)


def test_every_call_has_its_shape() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    (site,) = normswap.find(
        nn.Sequential(norm, nn.MaxPool2d(2), norm), torch.ones(1, CHANNELS, 4, 4)
    )
    assert site.input_shapes == ((1, CHANNELS, 4, 4), (1, CHANNELS, 2, 2))
    assert site.calls == 2


def test_a_norm_called_by_keyword_has_its_shape() -> None:
    (site,) = normswap.find(Around(lambda m, x: m.norm(input=x)), image())
    assert site.input_shape == tuple(image().shape)
    assert site.calls == 1


def test_a_norm_that_is_not_called_has_no_shape() -> None:
    _, masked = normswap.find(Masked(), image())
    assert (masked.input_shape, masked.calls) == (None, 0)


def test_example_inputs_see_through_control_flow() -> None:
    (site,) = normswap.find(Branching(nn.BatchNorm2d(CHANNELS)), image())
    assert site.calls == 1


class Scaled(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x * scale)


@pytest.mark.parametrize(
    "example_inputs",
    [
        (image(), torch.tensor(2.0)),
        [image(), torch.tensor(2.0)],
        {"scale": torch.tensor(2.0), "x": image()},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_arguments_come_by_position_or_by_name(example_inputs: object) -> None:
    (site,) = normswap.find(Scaled(), example_inputs)
    assert site.input_shape == tuple(image().shape)


def test_a_batch_of_one_is_enough() -> None:
    (site,) = normswap.find(nn.BatchNorm1d(3), torch.ones(1, 3))
    assert site.input_shape == (1, 3)


def test_no_gradients_are_recorded() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.norm(x)

    assert normswap.find(Watching(), image())[0].calls == 1
