"""What goes wrong with ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, and does not here.

Every test shows both: that torch's converter fails, and that this one does not. A test that fails
in its first half says that torch has been mended.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normswap
from normswap.errors import UnsupportedModel
from tests.swap.helpers import (
    CHANNELS,
    HOOKS,
    Doubled,
    NormReLU,
    Snapshot,
    batch_net,
    filled,
    image,
    outputs,
    same_bits,
)

torchs = nn.SyncBatchNorm.convert_sync_batchnorm


def ours(model: nn.Module, group: Any = None) -> nn.Module:
    return normswap.convert(model, "sync_bn", process_group=group)


class TwoNames(nn.Module):
    """One BatchNorm under two names, which the forward uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.alias = self.bn

    def forward(self, x: Any) -> Any:
        return self.alias(self.bn(self.conv(x)))


def test_one_norm_under_two_names_of_one_parent() -> None:
    broken = torchs(TwoNames())
    assert isinstance(broken.bn, nn.SyncBatchNorm)
    assert not isinstance(broken.alias, nn.SyncBatchNorm)

    model = ours(TwoNames())
    assert isinstance(model.bn, nn.SyncBatchNorm)
    assert model.alias is model.bn


def test_one_norm_in_two_parents() -> None:
    def build() -> Any:
        norm = nn.BatchNorm2d(CHANNELS)
        return nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})

    broken = torchs(build())
    assert broken["a"][0] is not broken["b"][0]

    model = ours(build())
    assert isinstance(model["a"][0], nn.SyncBatchNorm)
    assert model["a"][0] is model["b"][0]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str) -> None:
    def calls(convert: Any, *, removed: bool) -> int:
        count = 0

        def hook(*_: Any) -> None:
            nonlocal count
            count += 1

        model = batch_net()
        handle = HOOKS[kind](model[1], hook)
        convert(model)
        if removed:
            handle.remove()
        model(image()).sum().backward()
        model.load_state_dict(model.state_dict())
        return count

    assert calls(torchs, removed=False) == 0
    assert calls(ours, removed=False) == 1
    assert calls(ours, removed=True) == 0


def test_an_error_in_the_middle() -> None:
    """torch cannot take a parametrized weight, and finds out when half the model is converted."""

    def build() -> Any:
        model = filled(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)))
        parametrize.register_parametrization(model[1], "weight", Doubled())
        return model

    broken = build()
    with pytest.raises(TypeError):
        torchs(broken)
    assert isinstance(broken[0], nn.SyncBatchNorm)
    assert not isinstance(broken[1], nn.SyncBatchNorm)

    model = build()
    weight, original = model[1].weight.detach(), model[1].parametrizations.weight.original
    ours(model)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in model)
    assert same_bits(model[1].weight, weight)
    assert model[1].parametrizations.weight.original is original


def test_a_second_call_without_the_process_group() -> None:
    group = object()
    assert torchs(torchs(batch_net(), group))[1].process_group is None
    assert ours(ours(batch_net(), group))[1].process_group is group


def test_a_second_call_makes_no_new_modules() -> None:
    broken = torchs(batch_net())
    first = broken[1]
    assert torchs(broken)[1] is not first

    model = ours(batch_net())
    first = model[1]
    assert ours(model)[1] is first


def test_a_subclass_that_does_more_than_its_base() -> None:
    def build() -> Any:
        return filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), NormReLU(CHANNELS)))

    wanted = outputs(build(), image())
    assert wanted.min() == 0
    assert outputs(torchs(build()), image()).min() < 0

    model = nn.Sequential(nn.BatchNorm2d(3), *build())
    before = Snapshot(model[2])
    with pytest.warns(normswap.NormSwapWarning, match="overrides the forward"):
        ours(model)
    assert isinstance(model[0], nn.SyncBatchNorm)
    before.assert_kept(model[2], untouched=True)


def test_a_lazy_norm_before_its_first_batch() -> None:
    def build() -> Any:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d())

    assert torchs(build())[1].num_features == 0

    model = build()
    before = Snapshot(model)
    with pytest.raises(UnsupportedModel, match="run one batch"):
        ours(model)
    before.assert_kept(model)
    model(image())
    assert ours(model)[1].num_features == 8


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_module() -> None:
    broken = torch.jit.script(batch_net())
    torchs(broken)  # says nothing
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in broken.modules())

    with pytest.raises(UnsupportedModel, match="ScriptModule"):
        ours(torch.jit.script(batch_net()))


def test_a_compiled_model() -> None:
    """torch changes the model under its compiled code; here it is left as it was."""
    broken = torch.compile(batch_net())
    torchs(broken)
    assert isinstance(broken._orig_mod[1], nn.SyncBatchNorm)

    model = torch.compile(batch_net())
    with pytest.raises(UnsupportedModel, match="then compile"):
        ours(model)
    assert isinstance(model._orig_mod[1], nn.BatchNorm2d)


def test_attributes_and_buffers_of_the_users_own() -> None:
    def build() -> Any:
        model = batch_net()
        model[1].tag = "mine"
        model[1].register_buffer("extra", torch.ones(1))
        return model

    broken = torchs(build())
    assert not hasattr(broken[1], "tag")
    assert not hasattr(broken[1], "extra")

    model = ours(build())
    assert model[1].tag == "mine"
    assert "1.extra" in model.state_dict()


def test_the_way_back() -> None:
    """torch has none: the class, and with it the check of the input's dimension, is forgotten."""
    assert not hasattr(nn.SyncBatchNorm, "revert_sync_batchnorm")
    assert not hasattr(torchs(batch_net())[1], "dim")

    model = batch_net()
    before = Snapshot(model)
    normswap.revert(ours(model))
    before.assert_kept(model)
    with pytest.raises(ValueError, match="4D"):
        model[1](torch.zeros(2, CHANNELS))


def test_a_hook_that_changes_the_output_of_a_norm_with_two_names() -> None:
    """Evaluated before and after, bit for bit: what is lost shows in the outputs."""

    def build() -> Any:
        model = filled(TwoNames())
        model.bn.register_forward_hook(lambda module, args, y: y * 2)
        return model

    evaluated = outputs(build(), image())
    assert not same_bits(outputs(torchs(build()), image()), evaluated)
    assert same_bits(outputs(ours(build()), image()), evaluated)
