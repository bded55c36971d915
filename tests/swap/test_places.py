"""Places where a norm is used in ways that a replacement has to fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.swap.helpers import (
    TARGETS,
    Snapshot,
    batch_net,
    filled,
    image,
    numbers,
    outputs,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


# -- an activation in place, after a norm whose input is used again --------------------------------


class PreActivation(nn.Module):
    """The block of a pre-activation ResNet: its input is both normalized and passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(x))


def test_an_activation_in_place_after_an_identity_does_not_change_the_input() -> None:
    model = normswap.convert(PreActivation(), "identity")
    x = image()
    given = x.clone()
    assert same_bits(model(x), given + given.relu())
    assert same_bits(x, given)


MAKES = {"BatchNorm2d": lambda: nn.BatchNorm2d(8), "LayerNorm": lambda: nn.LayerNorm(8)}


@pytest.mark.parametrize(
    ("make", "target"),
    [(make, t) for make in MAKES for t in TARGETS if make == "BatchNorm2d" or t != "frozen_bn"],
)
def test_a_norm_never_hands_on_the_memory_of_its_input(make: str, target: str) -> None:
    norm = normswap.convert(filled(MAKES[make]()), target, where="*")
    x = numbers(2, 8, 6, 8)
    before = x.clone()
    with torch.no_grad():
        norm(x).zero_()
    assert same_bits(x, before)


# -- a norm whose attributes its parent reads ----------------------------------------------------


def encoder_layer() -> Any:
    """In float64: torch's fast path sums in another order, and swapped norms let values grow."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return filled(layer).double()


OTHERS = ["bn", "sync_bn", "gn", "in", "identity"]


@pytest.mark.parametrize("target", OTHERS)
def test_the_fast_path_of_a_transformer_layer_calls_the_new_norms(target: str) -> None:
    """In evaluation without gradients torch reads a norm's weights and never calls it."""
    layer = normswap.convert(encoder_layer(), target, where="*").eval()
    x = numbers(2, 5, 8, dtype=torch.float64) * 3 + 1
    with_gradients = layer(x).detach()
    with torch.no_grad():
        without = layer(x)
    torch.testing.assert_close(without, with_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", OTHERS)
def test_the_fast_path_of_a_transformer_calls_the_new_norms(target: str) -> None:
    """The encoder itself reads the norms of its first layer, too."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
    normswap.convert(encoder, target, where="*").eval()
    x = numbers(2, 5, 8, dtype=torch.float64) * 3 + 1
    with_gradients = encoder(x).detach()
    with torch.no_grad():
        without = encoder(x)
    torch.testing.assert_close(without, with_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["layers.0.*", "layers.1.*", "*"])
def test_a_transformer_with_padding_calls_the_new_norms(where: str) -> None:
    """torch packs the unpadded tokens for the fast path, which the new norms cannot take."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
    normswap.convert(encoder, "identity", where=where).eval()
    x, padding = numbers(2, 5, 8, dtype=torch.float64) * 3 + 1, torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with_gradients = encoder(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        without = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(without[~padding], with_gradients[~padding], rtol=1e-9, atol=1e-9)


def test_a_reverted_transformer_layer_takes_the_fast_path_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = encoder_layer().eval()
    before = Snapshot(layer)
    normswap.revert(normswap.convert(layer, "identity", where="*"))
    before.assert_kept(layer)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args)
    )
    with torch.no_grad():
        layer(numbers(2, 5, 8, dtype=torch.float64))
    assert calls


def test_a_layer_of_a_transformer_that_keeps_its_norms_keeps_its_fast_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.ModuleDict({"a": encoder_layer(), "b": encoder_layer()}).eval()
    normswap.convert(model, "identity", where="a.*")
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args)
    )
    with torch.no_grad():
        model["b"](numbers(2, 5, 8, dtype=torch.float64))
    assert calls


# -- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "in"])
@pytest.mark.parametrize("train", [True, False])
def test_channels_last_memory_stays_channels_last(target: str, train: bool) -> None:
    """All but InstanceNorm, whose outputs torch makes contiguous."""
    model = normswap.convert(batch_net(), target, where="*").to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    y = outputs(model, x, train=train)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, outputs(model, image(), train=train), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8), (2, 3, 5, 8)])
def test_a_batch_norm_for_a_layer_norm_pools_over_all_but_the_last_dimension(
    shape: tuple[int, ...],
) -> None:
    model = filled(nn.Sequential(nn.LayerNorm(8))).double()
    reference = nn.BatchNorm1d(8, eps=model[0].eps).double()
    reference.weight, reference.bias = model[0].weight, model[0].bias
    normswap.convert(model, "bn", where="*")
    x = numbers(*shape, dtype=torch.float64)
    expected = reference(x.reshape(-1, 8)).reshape(shape)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model[0].running_mean, reference.running_mean)
    torch.testing.assert_close(model[0].running_var, reference.running_var)


@pytest.mark.parametrize("target", ["gn", "in", "identity", "bn"])
def test_tokens_come_out_in_the_layout_in_which_they_went_in(target: str) -> None:
    model = normswap.convert(filled(nn.Sequential(nn.LayerNorm(8))), target, where="*")
    x = numbers(4, 5, 8)
    assert model(x).shape == x.shape
    assert normswap.find(model)[0].channel_dim == -1


def test_tokens_and_back_is_torchs_layer_norm() -> None:
    model = filled(nn.Sequential(nn.LayerNorm(8)))
    for target in ("bn", "gn", "sync_bn", "in"):
        normswap.convert(model, target, where="*")
    normswap.convert(model, "ln", where="*", carry="copy")
    assert type(model[0]) is nn.LayerNorm


# -- the forms in which a model is used afterwards -------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_converted_model_moves_as_a_whole(target: str) -> None:
    """``.to`` finds every tensor of the new norms."""
    model = normswap.convert(batch_net(), target, where="*").to("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("target", TARGETS)
def test_autocast_takes_a_converted_model(target: str) -> None:
    model = normswap.convert(batch_net(), target, where="*")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(image())
    y.float().sum().backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_torch_func_takes_a_converted_model(target: str) -> None:
    model = normswap.convert(batch_net(), target, where="*").eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        y = torch.func.functional_call(model, tensors, (image(),))
        assert same_bits(y, model(image()))


def test_a_checkpoint_without_counters_fits_a_frozen_bn_as_it_fits_a_bn() -> None:
    """Old checkpoints, and those of other frozen norms, have no ``num_batches_tracked``."""
    old = {k: v for k, v in batch_net().state_dict().items() if "num_batches" not in k}
    batch_net().load_state_dict(dict(old))
    normswap.convert(batch_net(), "frozen_bn").load_state_dict(dict(old))
