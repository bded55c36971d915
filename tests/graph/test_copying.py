"""A copy for looking: its own modules and buffers, the same weights, no hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normswap.graph.copying import structure_copy
from tests.graph.models import Caching, block, image
from tests.reference.footprint import footprint


def test_the_weights_are_the_same_objects() -> None:
    model = block()
    copied = structure_copy(model)
    for name, weight in model.named_parameters():
        assert copied.get_parameter(name) is weight


def test_the_buffers_are_its_own() -> None:
    model = block()
    before = footprint(model)
    copied = structure_copy(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(copied.get_buffer(name), buffer)
        copied.get_buffer(name).add_(1)
    assert footprint(model) == before


def test_one_buffer_under_two_names_stays_one() -> None:
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    second.running_mean = first.running_mean
    copied = structure_copy(nn.Sequential(first, second))
    assert copied[0].running_mean is copied[1].running_mean


def test_the_modules_are_others() -> None:
    model = nn.Sequential(block())
    shared = set(map(id, model.modules())) & set(map(id, structure_copy(model).modules()))
    assert not shared


def test_a_tensor_kept_as_a_plain_attribute_is_shared_too() -> None:
    model = block()
    model.table = torch.zeros(3)  # type: ignore[assignment]
    assert structure_copy(model).table is model.table


def test_a_tensor_with_a_history_is_no_obstacle() -> None:
    model = Caching()
    model(image())
    copied = structure_copy(model)
    assert copied.last is model.last
    assert copied.all[0] is model.all[0]


def test_what_happens_to_the_copys_attributes_stays_there() -> None:
    model = nn.Sequential(block())
    copied = structure_copy(model)
    copied.eval()
    copied.extra = 1  # type: ignore[assignment]
    copied[0][1] = nn.Identity()
    copied[0].register_forward_hook(print)
    assert model.training
    assert model[0].training
    assert not hasattr(model, "extra")
    assert isinstance(model[0][1], nn.BatchNorm2d)
    assert not model[0]._forward_hooks


def test_the_users_hooks_are_not_in_it() -> None:
    model, seen = block(), list[object]()
    model.register_forward_pre_hook(lambda *call: seen.append(call))
    model[1].register_forward_hook(lambda *call: seen.append(call))
    structure_copy(model)(image())
    assert seen == []


def test_one_module_under_two_names_stays_one() -> None:
    shared = block()
    copied = structure_copy(nn.Sequential(shared, shared))
    assert copied[0] is copied[1]
    assert copied[0] is not shared


def test_what_cannot_be_copied_raises() -> None:
    model = block()
    model.generator = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(TypeError):
        structure_copy(model)
