"""Converted norms that cannot be fitted are left, with the reason."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.errors import StatisticsError
from tests.reference.data import fill, values
from tests.stats.calibration.nets import batches, bits, conv_net, pair_of


class Called(nn.Module):
    """Normalizes by a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(self.layer(x), (6,))


def left_alone(model: nn.Module, data: list[Tensor]) -> str:
    """Why its one norm cannot be fitted, whose values are as before."""
    before = bits(model)
    with pytest.raises(StatisticsError, match="no converted normalization can be fitted") as error:
        normswap.calibrate(model, data, where="*")
    assert bits(model) == before
    return str(error.value)


def test_a_call_in_a_forward_is_left() -> None:
    data = list(values(8, 6).split(2))
    model = normswap.convert(fill(Called()).eval(), "rms", where="*", example_inputs=data[0])
    assert "a call in a forward" in left_alone(model, data)


def test_a_norm_without_gain_is_left() -> None:
    net = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4, affine=False))).eval()
    model = normswap.convert(net, "ln", where="*")
    assert model[1].weight is None
    assert "no gain" in left_alone(model, batches())


def test_a_shared_affine_is_left() -> None:
    model, _ = pair_of(conv_net())
    model[4].weight = model[1].weight
    reason = left_alone(model, batches())
    assert reason.count("another layer's too") == 2


def test_a_parametrized_affine_is_left() -> None:
    model, _ = pair_of(conv_net())
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    report = normswap.calibrate(model, batches(), refine_passes=0)
    assert [row.path for row in report.calibrated] == ["4"]
    assert "parametrization" in report.left[0].status
