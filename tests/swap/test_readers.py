"""Forwards that read a norm's tensors or settings: what they read is there, or it stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import UnsupportedModel
from tests.swap.helpers import CHANNELS, Snapshot, filled, image, outputs, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


class Own(nn.Module):
    """A norm of someone's own, with an eps of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CHANNELS))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(square + self.variance_epsilon)


class Reading(nn.Module):
    """Reads something of its norm, and calls it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(3, CHANNELS)
        self.norm = norm


class ByDevice(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).to(self.norm.weight.device))


class ByShape(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.checked(self.linear(x))

    def checked(self, x: Tensor) -> Tensor:
        if tuple(self.norm.normalized_shape) != x.shape[-1:]:
            raise ValueError("of another size")
        return self.norm(x)


class ByEps(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x) + self.norm.variance_epsilon)


def tokens() -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("cls", "norm", "to", "missing"),
    [
        (ByDevice, nn.LayerNorm(CHANNELS), "identity", "weight"),
        (ByDevice, nn.LayerNorm(CHANNELS), "rms", ""),
        (ByDevice, nn.LayerNorm(CHANNELS), "gn", ""),
        (ByShape, nn.LayerNorm(CHANNELS), "gn", "normalized_shape"),
        (ByShape, nn.LayerNorm(CHANNELS), "rms", ""),
        (ByEps, Own(), "ln", ""),
        (ByEps, Own(), "identity", ""),
    ],
)
def test_what_is_read_is_there_or_the_norm_stays(
    cls: type[Reading], norm: nn.Module, to: str, missing: str
) -> None:
    model: Any = filled(cls(copy.deepcopy(norm))).eval()
    before, expected = Snapshot(model), model(tokens())
    if missing:
        words = rf"norm.*the forward of {cls.__name__} reads its {missing}, and .* has none"
        with pytest.raises(normswap.errors.NothingToConvert, match=words):
            normswap.convert(model, to, where="*")
        before.assert_kept(model, untouched=True)
        return
    normswap.convert(model, to, where="*")
    model(tokens())
    normswap.revert(model)
    assert same_bits(model(tokens()), expected)


# -- folding -----------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1, bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Folding(nn.Module):
    """Becomes one convolution, as RepVGG does."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.branch.bn.running_mean, self.branch.bn.running_var

    def reparameterize(self) -> nn.Conv2d:
        weight, bias = self._folded(self.branch)
        made = nn.Conv2d(3, CHANNELS, 1)
        made.load_state_dict({"weight": weight, "bias": bias})
        return made

    @staticmethod
    def _folded(branch: Any) -> tuple[Tensor, Tensor]:
        slope = branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()
        bias = branch.bn.bias - slope * branch.bn.running_mean
        return branch.conv.weight * slope.view(-1, 1, 1, 1), bias


@pytest.mark.parametrize("to", ["gn", "identity", "iebn", "in", "mabn"])
def test_folding_another_norm_is_refused_until_it_is_back(to: str) -> None:
    model: Any = filled(nn.Sequential(nn.Identity(), Folding())).eval()
    expected = outputs(model, image())
    normswap.convert(model, to)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedModel, match=r"1 \(Folding\)\.reparameterize folds .*revert"):
            each[1].reparameterize()
    assert "statistics" not in vars(model[1]), "reads them, and folds nothing"
    normswap.revert(model)
    assert "reparameterize" not in vars(model[1])
    torch.testing.assert_close(model[1].reparameterize()(image()), expected)


class Asking(Folding):
    """Asks for a class before it folds, as timm's do."""

    def reparameterize(self) -> nn.Conv2d:
        assert isinstance(self.branch.bn, nn.BatchNorm2d)
        weight, bias = self._folded(self.branch)
        made = nn.Conv2d(3, CHANNELS, 1)
        made.load_state_dict({"weight": weight, "bias": bias})
        return made


@pytest.mark.parametrize(("to", "folds"), [("frozen_bn", False), ("sync_bn", False), ("bn", True)])
def test_a_class_that_folding_asks_for_has_to_be_there(to: str, folds: bool) -> None:
    model: Any = filled(nn.Sequential(Asking())).eval()
    normswap.convert(model, "gn" if folds else to)
    normswap.convert(model, to, where="*")
    assert ("reparameterize" in vars(model[0])) is not folds


@pytest.mark.parametrize("to", ["sync_bn", "frozen_bn", "ghost_bn"])
def test_what_evaluates_as_a_batch_norm_folds_as_before(to: str) -> None:
    model: Any = filled(nn.Sequential(Folding())).eval()
    normswap.convert(model, to)
    with torch.no_grad():
        torch.testing.assert_close(model[0].reparameterize()(image()), model(image()))
