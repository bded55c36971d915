"""A calibrated model leads back to its original, also from copies and files."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.stats.calibration.nets import (
    NORMS,
    batches,
    bits,
    conv_net,
    grouped,
    images,
)


@pytest.mark.parametrize("carry", ["auto", "copy", "fresh"])
@pytest.mark.parametrize("to", ["gn", "ln", "in"])
def test_revert_brings_the_original_back_to_the_bit(to: str, carry: str) -> None:
    model = conv_net()
    before, data = bits(model), images(8)
    with torch.no_grad():
        wanted = model(data)
    options = {"num_groups": 2} if to == "gn" else {}
    normswap.convert(model, to, carry=carry, **options)
    for _ in range(2):
        normswap.calibrate(model, batches())
    normswap.revert(model)
    assert bits(model) == before
    with torch.no_grad():
        assert torch.equal(model(data), wanted)


def test_a_chain_leads_back_to_the_first() -> None:
    model = conv_net()
    before = bits(model)
    normswap.convert(model, "ln")
    normswap.convert(model, "gn", num_groups=2, where="*", calibrate=batches())
    normswap.convert(model, "in", where="*", calibrate=batches())
    assert {str(row.fidelity) for row in normswap.report(model)} == {"calibrated"}
    normswap.convert(model, "ln", where="*")
    normswap.revert(model)
    assert [type(model.get_submodule(path)) for path in NORMS] == [nn.BatchNorm2d] * 2
    assert bits(model) == before


def test_new_statistics_go_with_a_revert() -> None:
    model = grouped()
    before = bits(model)
    normswap.convert(model, "bn", where="*", calibrate=batches())
    assert model[1].running_mean.any()
    assert normswap.report(model)[0].fidelity == "calibrated"
    normswap.revert(model)
    assert bits(model) == before


def saved_and_loaded(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("move", [copy.deepcopy, saved_and_loaded, through_torch])
def test_a_calibrated_model_is_copied_and_reverted(move: Any) -> None:
    original = conv_net()
    model = normswap.convert(copy.deepcopy(original), "gn", num_groups=2, calibrate=batches())
    moved = move(model)
    assert bits(moved) == bits(model)
    assert str(normswap.report(moved)) == str(normswap.report(model))
    normswap.revert(moved)
    assert bits(moved) == bits(original)
    assert bits(model) != bits(original)


def test_a_calibrated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    original = conv_net()
    model = normswap.convert(copy.deepcopy(original), "gn", num_groups=2, calibrate=batches())
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(copy.deepcopy(original), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images(8)), model(images(8)))
