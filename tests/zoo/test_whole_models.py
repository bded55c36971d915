"""Whole models of timm and torchvision: folding, known layers, and what their libraries do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

timm = pytest.importorskip("timm", minversion="1.0")

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


def trained(name: str, **arguments: Any) -> Any:
    """A model whose norms have statistics and affines that are all different."""
    torch.default_generator.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 2)
    return model


def picture(size: int = 96) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_large_100"])
def test_every_batch_norm_is_folded(name: str) -> None:
    model = trained(name)
    before, keys = out(model, picture()), list(model.state_dict())
    normswap.convert(model, "fold")
    after = out(model, picture())
    assert not any(isinstance(norm, _BatchNorm) for norm in model.modules())
    assert float((after - before).norm() / before.norm()) < 1e-5
    normswap.revert(model)
    assert torch.equal(out(model, picture()), before)
    assert list(model.state_dict()) == keys


def test_of_a_densenet_what_can_be_folded_is_and_the_rest_has_its_reason() -> None:
    model = trained("densenet121")
    before = out(model, picture())
    plan = normswap.plan(model, "fold")
    assert (len(plan.of("convert")), len(plan.of("skip"))) == (59, 62)
    assert all("before it" in step.reason for step in plan.of("skip"))
    after = out(plan.apply(), picture())
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_a_global_response_norm_is_left_alone() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnextv2_atto", pretrained=False)
    assert normswap.find(model).counts()["grn"] > 0
    with pytest.raises(normswap.NormSwapError):
        normswap.convert(model, "gn", where="kind:grn")
    plan = normswap.plan(model, "rms2d")
    assert {step.site.kind for step in plan.of("convert")} == {"layer_norm"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("regnetz_b16_evos", "evonorm"), ("resnetv2_50d_frn", "filter_response_norm")],
)
def test_norms_that_no_target_is_like_become_others(name: str, kind: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert normswap.find(model).counts()[kind] > 0
    assert not normswap.plan(model, "gn", where="*").of("skip")


def test_features_only() -> None:
    model = normswap.convert(trained("resnet18", features_only=True), "sync_bn")
    assert len(model(picture())) == 5
    assert not any(type(norm) is nn.BatchNorm2d for norm in model.modules())


def test_the_head_can_still_be_reset() -> None:
    model = normswap.convert(trained("resnet18"), "gn")
    model.reset_classifier(7)
    assert model(picture()).shape == (2, 7)
    assert model.forward_features(picture()).ndim == 4
    assert model.default_cfg["architecture"] == "resnet18"


def test_reparameterisation_after_revert() -> None:
    utils = pytest.importorskip("timm.utils")
    model = trained("repvgg_a0")
    before = out(model, picture())
    normswap.revert(normswap.convert(model, "gn"))
    merged = utils.reparameterize_model(model)
    torch.testing.assert_close(out(merged, picture()), before, rtol=1e-3, atol=1e-3)


def test_torchvisions_frozen_batch_norm_trains_again_and_comes_back() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(ops.FrozenBatchNorm2d(8, eps=1e-3))
    model[0].running_mean.normal_()
    x = torch.randn(4, 8, 5, 5)
    before, keys = model(x), list(model.state_dict())
    normswap.convert(model, "bn").eval()
    assert type(model[0]) is nn.BatchNorm2d
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), before)
    normswap.revert(model)
    assert type(model[0]) is ops.FrozenBatchNorm2d
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
