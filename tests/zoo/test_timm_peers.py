"""What goes wrong with timm's converters, and does not here.

Every test shows both: that timm's converter fails, and that this one does not. A test that fails
in its first half says that timm has been mended.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.swap.helpers import filled, numbers, outputs, same_bits, train_step

layers = pytest.importorskip("timm.layers")
freeze = layers.freeze_batch_norm_2d
unfreeze = layers.unfreeze_batch_norm_2d


def net(**settings: Any) -> Any:
    """A convolution and a BatchNorm with a fused ReLU."""
    return filled(nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct2d(8, **settings)))


def plain(**settings: Any) -> Any:
    """A convolution and a BatchNorm."""
    return filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, **settings)))


def picture() -> Tensor:
    return numbers(4, 3, 6, 6)


# -- the activation -----------------------------------------------------------------------------


def test_torchs_converter_on_a_fused_activation() -> None:
    evaluated = outputs(net(), picture())
    assert evaluated.min() == 0
    broken = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    assert outputs(broken, picture()).min() < 0

    model = normswap.convert(net(), "sync_bn")
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert same_bits(outputs(model, picture()), evaluated)


def test_converting_twice_and_a_fused_activation() -> None:
    evaluated = outputs(net(), picture())
    broken = layers.convert_sync_batchnorm(net())
    assert same_bits(outputs(broken, picture()), evaluated)
    assert outputs(layers.convert_sync_batchnorm(broken), picture()).min() < 0

    model = normswap.convert(normswap.convert(net(), "sync_bn"), "sync_bn")
    assert same_bits(outputs(model, picture()), evaluated)


def test_converting_twice_and_the_process_group() -> None:
    group = object()
    broken = layers.convert_sync_batchnorm(plain(), process_group=group)
    assert layers.convert_sync_batchnorm(broken)[1].process_group is None

    model = normswap.convert(plain(), "sync_bn", process_group=group)
    assert normswap.convert(model, "sync_bn")[1].process_group is group


def test_hooks_and_two_names() -> None:
    def build() -> Any:
        model = net()
        model.add_module("alias", model[1])
        model[1].register_forward_hook(lambda *_: None)
        return model

    broken = layers.convert_sync_batchnorm(build())
    assert broken.alias is not broken[1]
    assert not broken[1]._forward_hooks

    model = normswap.convert(build(), "sync_bn")
    assert model.alias is model[1]
    assert len(model[1]._forward_hooks) == 1


# -- freezing and back --------------------------------------------------------------------------


def there_and_back(model: Any) -> Any:
    return normswap.revert(normswap.convert(model, "frozen_bn"))


@pytest.mark.parametrize("build", [net, plain])
def test_momentum_and_counter_after_freezing_and_back(build: Any) -> None:
    broken = unfreeze(freeze(build(momentum=0.3)))
    assert broken[1].momentum == 0.1
    assert broken[1].num_batches_tracked == 0

    model = there_and_back(build(momentum=0.3))
    assert model[1].momentum == 0.3
    assert model[1].num_batches_tracked == 7


def test_thawing_a_model_that_was_built_frozen() -> None:
    """torchvision's frozen norm does not say whether it is affine, which timm asks it."""
    native = type(freeze(plain())[1])
    with pytest.raises(AttributeError):
        unfreeze(nn.Sequential(nn.Conv2d(3, 8, 1), native(8)))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), normswap.build("frozen_bn", 8))
    assert isinstance(normswap.convert(model, "bn")[1], nn.BatchNorm2d)


@pytest.mark.parametrize("build", [net, plain])
def test_requires_grad_after_freezing_and_back(build: Any) -> None:
    def frozen() -> Any:
        model = build()
        model[1].weight.requires_grad_(False)
        return model

    assert unfreeze(freeze(frozen()))[1].weight.requires_grad

    assert not there_and_back(frozen())[1].weight.requires_grad


@pytest.mark.parametrize("build", [net, plain])
def test_optimizers_after_freezing_and_back(build: Any) -> None:
    def moves(convert: Any) -> bool:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        convert(model)
        before = model[1].weight.detach().clone()
        train_step(model, picture(), optimizer)
        return not same_bits(model[1].weight, before)

    assert not moves(lambda model: unfreeze(freeze(model)))
    assert moves(there_and_back)


@pytest.mark.parametrize("build", [net, plain])
def test_the_keys_of_a_frozen_model(build: Any) -> None:
    """A checkpoint of the model fits its frozen form only with timm's special loading."""
    keys = list(build().state_dict())
    assert list(freeze(build()).state_dict()) != keys
    assert list(normswap.convert(build(), "frozen_bn").state_dict()) == keys


@pytest.mark.parametrize("dim", [1, 3])
def test_freezing_knows_other_dimensions(dim: int) -> None:
    def build() -> Any:
        conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dim]
        return filled(nn.Sequential(conv(3, 8, 1), norm(8)))

    x = numbers(4, 3, *[5] * dim)
    broken = freeze(build())
    assert not same_bits(outputs(broken, x, train=True), outputs(broken, x))

    model = normswap.convert(build(), "frozen_bn")
    assert same_bits(outputs(model, x, train=True), outputs(build(), x))


def test_a_frozen_norm_without_affine_in_double_precision() -> None:
    def build() -> Any:
        return plain(affine=False).double()

    broken = freeze(build())
    assert {t.dtype for t in broken[1].buffers()} == {torch.float32, torch.float64}

    model = normswap.convert(build(), "frozen_bn")
    floating = [t for t in model[1].state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}


# -- splitting ----------------------------------------------------------------------------------


def test_the_mode_of_a_converted_norm() -> None:
    broken = layers.convert_splitbn_model(plain().eval())
    assert broken[1].training

    assert not normswap.convert(plain().eval(), "gn")[1].training


def test_the_parameters_of_a_converted_norm() -> None:
    model = plain()
    weight = model[1].weight
    assert layers.convert_splitbn_model(model)[1].weight is not weight

    model = plain()
    weight = model[1].weight
    assert normswap.convert(model, "gn")[1].weight is weight
