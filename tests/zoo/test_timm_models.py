"""timm's models: fused activations and dropouts live on, evaluation stays, features come out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.swap.helpers import (
    COPIES,
    TARGETS,
    Snapshot,
    filled,
    numbers,
    outputs,
    same_bits,
    same_state,
)

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")

#: Models whose norms are BatchNorms, plain or with an activation; the test_ ones are timm's own.
BATCH_MODELS = [
    "resnet18",
    "efficientnet_b0",
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "mobilenetv3_small_050",
]


def model_of(name: str, **settings: Any) -> Any:
    torch.default_generator.manual_seed(0)
    return timm.create_model(name, num_classes=5, **settings)


def picture(*, batch: int = 2, size: int = 64) -> Tensor:
    return numbers(batch, 3, size, size)


def block(norm: nn.Module) -> nn.Sequential:
    """A convolution and a norm that carries its activation."""
    return filled(nn.Sequential(nn.Conv2d(3, 8, 1), norm))


FUSED = {
    "BatchNormAct2d": lambda **how: layers.BatchNormAct2d(8, **how),
    "GroupNormAct": lambda **how: layers.GroupNormAct(8, num_groups=2, **how),
    "GroupNorm1Act": lambda **how: layers.GroupNorm1Act(8, **how),
    "FrozenBatchNormAct2d": lambda **how: layers.FrozenBatchNormAct2d(8, **how),
    "LayerNormAct2d": lambda **how: layers.LayerNormAct2d(8, **how),
    "RmsNormAct2d": lambda **how: layers.RmsNormAct2d(8, **how),
}


# -- fused layers -------------------------------------------------------------------------------


def test_timms_own_sync_layer_is_read_with_its_activation() -> None:
    model = layers.convert_sync_batchnorm(block(layers.BatchNormAct2d(8)))
    evaluated = outputs(model, picture())
    normswap.convert(model, "frozen_bn")
    assert same_bits(outputs(model, picture()), evaluated)
    assert evaluated.min() == 0


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize(
    ("name", "target"),
    [(n, t) for n in FUSED for t in TARGETS if t != "frozen_bn" or "BatchNorm" in n],
)
def test_dropout_and_activation_run_after_any_norm_in_order(name: str, target: str) -> None:
    """The dropout is a tanh here, the activation adds: only tanh(norm(x)) + 10 lies in 9 to 11."""

    class AddTen(nn.Module):
        def __init__(self, inplace: bool = False) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x + 10

    model = block(FUSED[name](act_layer=AddTen, drop_layer=nn.Tanh))
    drop, act = model[1].drop, model[1].act
    for _ in range(2):
        normswap.convert(model, target, where="*")
        y = outputs(model, picture() * 20)
        assert 9 <= y.min() < 9.5
        assert 10.5 < y.max() <= 11
        assert model[1].drop is drop
        assert model[1].act is act


@pytest.mark.parametrize("name", FUSED)
def test_dropout_and_activation_are_kept_over_a_chain_of_conversions(name: str) -> None:
    model = block(FUSED[name](act_layer=nn.Sigmoid))
    before, evaluated = Snapshot(model), outputs(model, picture())
    for target in ("in", "bn", "frozen_bn", "ln", "sync_bn", "gn"):
        normswap.convert(model, target, where="*")
        y = outputs(model, picture() * 20)
        assert 0 <= y.min() < 0.5 < y.max() <= 1
    normswap.revert(model)
    before.assert_kept(model)
    assert same_bits(outputs(model, picture()), evaluated)


def test_a_real_dropout_follows_the_mode() -> None:
    model = block(layers.BatchNormAct2d(8, drop_layer=lambda: nn.Dropout(0.5)))
    normswap.convert(model, "frozen_bn")
    evaluated = outputs(model, picture())
    assert not same_bits(outputs(model, picture(), train=True), evaluated)
    assert same_bits(outputs(model, picture()), evaluated)


def test_an_activation_in_place_does_not_change_what_went_into_an_identity() -> None:
    """timm's fused activations work in place, and pre-activation blocks use the input again."""
    model = block(layers.BatchNormAct2d(8))[1:]
    with pytest.warns(normswap.NormSwapWarning):
        normswap.convert(model, "identity")
    x = numbers(2, 8, 4, 4)
    before = x.clone()
    assert same_bits(model(x), before.relu())
    assert same_bits(x, before)


def test_activations_with_parameters_train_on() -> None:
    model = block(layers.BatchNormAct2d(8, act_layer=nn.PReLU, act_kwargs={"num_parameters": 8}))
    slope, keys = model[1].act.weight, list(model.state_dict())
    normswap.convert(model, "sync_bn")
    assert list(model.state_dict()) == keys
    model(picture()).sum().backward()
    assert slope.grad.abs().sum() > 0


def test_a_fused_group_norm_is_exact_in_another_exact_form() -> None:
    model = block(layers.GroupNormAct(8, num_groups=8)).double()
    x = picture(size=8).double()
    evaluated = outputs(model, x)
    (step,) = normswap.plan(model, "in")
    assert step.fidelity == "exact"
    normswap.convert(model, "in")
    torch.testing.assert_close(outputs(model, x), evaluated, rtol=0, atol=1e-10)


def test_a_layer_with_a_forward_of_its_own_is_skipped_with_the_reason() -> None:
    model = nn.ModuleDict({"a": block(nn.BatchNorm2d(8)), "b": layers.SplitBatchNorm2d(8)})
    before = Snapshot(model["b"])
    with pytest.warns(normswap.NormSwapWarning, match="SplitBatchNorm2d.*overrides the forward"):
        normswap.convert(model, "gn", where="*")
    before.assert_kept(model["b"], untouched=True)


@pytest.mark.parametrize("target", ["bn", "sync_bn"])
@pytest.mark.parametrize("make", [layers.BatchNormAct2d, nn.BatchNorm2d])
def test_a_model_that_timm_froze_thaws_and_comes_back(make: Any, target: str) -> None:
    """timm and torchvision keep weight and bias of a frozen norm as buffers."""
    model = layers.freeze_batch_norm_2d(block(make(8)))
    before, evaluated = Snapshot(model), outputs(model, picture())
    keys = list(model.state_dict())
    normswap.convert(model, target, example_inputs=picture())
    assert [key for key in model.state_dict() if "num_batches" not in key] == keys
    assert {"1.weight", "1.bias"} <= {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(outputs(model, picture()), evaluated)
    model.train()(picture()).sum().backward()
    assert model[1].weight.grad.isfinite().all()
    normswap.revert(model.eval())
    model.train()
    reset_statistics(model, before)
    before.assert_kept(model)


# -- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn"])
@pytest.mark.parametrize("name", BATCH_MODELS)
def test_evaluation_is_the_same_bit_for_bit(name: str, target: str) -> None:
    model = filled_statistics(model_of(name))
    keys, evaluated = list(model.state_dict()), outputs(model, picture())
    features = model.eval().forward_features(picture())
    normswap.convert(model, target, strict=True)
    assert list(model.state_dict()) == keys
    assert same_bits(outputs(model, picture()), evaluated)
    assert same_bits(model.forward_features(picture()), features)
    normswap.convert(model, target)
    assert same_bits(outputs(model, picture()), evaluated)


def filled_statistics(model: Any) -> Any:
    """Statistics as a trained model has them: of one batch, which keeps activations in range."""
    with torch.no_grad():
        model.train()(picture(batch=4))
    return model


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_a_model_goes_to_any_norm_trains_and_comes_back(name: str, target: str) -> None:
    model = model_of(name).train()
    before = Snapshot(model)
    normswap.convert(model, target, where="*")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(picture(batch=4)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.forward_features(picture()).ndim == 4
    optimizer.zero_grad()
    normswap.revert(model)
    reset_statistics(model, before)
    before.assert_kept(model)


def reset_statistics(model: Any, before: Snapshot) -> None:
    """Undo what forwards in train mode have done to running statistics."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffer.copy_(before.values[path][name][0])


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_converted_model_answer_the_same(way: str) -> None:
    model = normswap.convert(filled_statistics(model_of("test_efficientnet")), "gn")
    clone = COPIES[way](model)
    assert same_state(clone, model)
    assert same_bits(outputs(clone, picture()), outputs(model, picture()))
    assert [type(m) for m in normswap.revert(clone).modules()] == [
        type(m) for m in model_of("test_efficientnet").modules()
    ]


def test_resnetv2_keeps_the_activations_of_its_group_norms() -> None:
    """Its norms are GroupNormAct, in pre-activation order, and its convolutions standardized."""
    with torch.device("meta"):
        model = model_of("resnetv2_50x1_bit")
    acts = {path: m.act for path, m in model.named_modules() if hasattr(m, "act")}
    normswap.convert(model, "ln", strict=True)
    found = normswap.find(model)
    assert {site.kind for site in found} == {"layer_norm"}
    assert len(found) == 49
    for path, act in acts.items():
        assert model.get_submodule(path).act is act


@pytest.mark.parametrize("target", ["in", "ln", "bn"])
def test_a_model_with_fused_group_norms_runs_after(target: str) -> None:
    model = model_of("test_efficientnet_gn").eval()
    acts = [type(m.act) for m in model.modules() if isinstance(m, layers.GroupNormAct)]
    normswap.convert(model, target, where="*", strict=True)
    norms = [site.module for site in normswap.find(model)]
    assert [type(norm.act) for norm in norms] == acts
    assert model.forward_features(picture()).isfinite().all()
    assert type(normswap.revert(model).conv_stem) is nn.Conv2d


def test_maxvit_keeps_its_layer_norms_where_only_batch_norms_are_meant() -> None:
    with torch.device("meta"):
        model = model_of("maxvit_tiny_tf_224")
    layer_norms = {p: m for p, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    batch = {p: m.act for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    plan = normswap.plan(model, "sync_bn")
    assert {step.site.path for step in plan.of("leave")} == set(layer_norms)
    assert all("layer_norm is not a source" in step.reason for step in plan.of("leave"))
    normswap.convert(model, "sync_bn", strict=True)
    normswap.convert(model, "sync_bn", strict=True)
    for path, norm in layer_norms.items():
        assert model.get_submodule(path) is norm
    for path, act in batch.items():
        assert isinstance(model.get_submodule(path), nn.SyncBatchNorm)
        assert model.get_submodule(path).act is act
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn"])
def test_a_small_maxvit_evaluates_the_same_bit_for_bit(target: str) -> None:
    model = filled_statistics(model_of("maxvit_rmlp_pico_rw_256", img_size=64))
    evaluated = outputs(model, picture())
    for _ in range(2):
        normswap.convert(model, target, strict=True)
        assert same_bits(outputs(model, picture()), evaluated)
    assert model.eval().forward_features(picture()).ndim == 4


def test_no_library_is_imported_for_the_users_who_have_none() -> None:
    """timm is learnt from when it is loaded, and not otherwise."""
    code = (
        "import normswap, sys; from torch import nn; "
        "normswap.convert(nn.Sequential(nn.BatchNorm2d(8)), 'gn'); "
        "assert not any(name.split('.')[0] == 'timm' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
