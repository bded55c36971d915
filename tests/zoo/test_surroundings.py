"""Norms that need the graph, on models that people use: what they find, and all the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import normswap
from normswap.norms.standardization.filter_response import TLU

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

MODELS: dict[str, Any] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(),
    "torchvision googlenet": lambda: torchvision.models.googlenet(
        init_weights=False, aux_logits=False
    ),
    "timm resnet10t": lambda: timm.create_model("resnet10t"),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm densenet121": lambda: timm.create_model("densenet121"),
}

NORMS = ("frn", "evonorm_b0", "evonorm_s0", "kalman", "cosine", "ws_gn", "cbn")


def model_of(name: str) -> Any:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return MODELS[name]().eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "units"),
    [
        # The stem's and the first of each block of two; the second ends in a sum.
        ("torchvision resnet18", 9),
        ("timm resnet10t", 7),
        ("torchvision googlenet", 57),
    ],
)
def test_every_relu_that_a_norm_has_for_itself_is_found(name: str, units: int) -> None:
    converted = normswap.convert(model_of(name), "frn")
    assert sum(isinstance(module, TLU) for module in converted.modules()) == units


@pytest.mark.parametrize("name", ["timm mobilenetv3", "timm densenet121"])
def test_every_fused_relu_is_found(name: str) -> None:
    model = model_of(name)
    fused = [type(getattr(module, "act", None)).__name__ for module in model.modules()]
    converted = normswap.convert(model, "frn")
    units = sum(isinstance(module, TLU) for module in converted.modules())
    assert units == fused.count("ReLU") > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, norm: str) -> None:
    model = model_of(name)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    expected = model(image())
    plan = normswap.plan(model, norm)
    promised = {step.fidelity for step in plan.of("convert")}
    converted = plan.apply()
    y = converted(image())
    assert y.isfinite().all()
    if promised <= {"exact", "eval"}:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    converted.train()(image()).sum().backward()
    assert normswap.revert(converted) is model
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(before)
    trained = [key for key in before if "running" in key or "batches" in key]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if k not in trained)
