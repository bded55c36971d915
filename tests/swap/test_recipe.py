"""Recipes say what was done as plain data, and files carry it with the tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import NormSwapError, RecipeError
from tests.swap.helpers import (
    CHANNELS,
    SOURCES,
    TARGETS,
    Snapshot,
    batch_net,
    filled,
    image,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CHAINS: dict[str, list[Any]] = {
    **{target: [target] for target in TARGETS},
    "fold": ["fold"],
    "options": [("gn", {"num_groups": 4, "eps": 0.25})],
    "synchronised": [("bn", {"sync": True})],
    "through another": ["gn", "bn"],
    "mapping": [{"1": "in", "*": "sync_bn"}],
}


def net() -> Any:
    return filled(
        nn.Sequential(
            nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, eps=1e-3), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, affine=False),
        )
    )  # fmt: skip


def converted(name: str) -> Any:
    model = net()
    for step in CHAINS[name]:
        to, options = step if isinstance(step, tuple) else (step, {})
        arguments = {} if isinstance(to, dict) or to == "fold" else {"where": ["1", "4"]}
        normswap.convert(model, to, **arguments, **options)
    return model


@pytest.mark.parametrize("name", CHAINS)
def test_a_recipe_survives_json_and_makes_the_same_norms(name: str) -> None:
    model = converted(name)
    recipe = json.loads(json.dumps(normswap.recipe(model)))
    again = normswap.apply_recipe(net(), recipe)
    assert [repr(m) for m in again.modules()] == [repr(m) for m in model.modules()]
    assert list(again.state_dict()) == list(model.state_dict())
    # What a chain brought back to where it was is not done again.
    assert name == "through another" or normswap.recipe(again) == recipe


@pytest.mark.parametrize("name", CHAINS)
def test_a_saved_model_loads_with_equal_outputs(name: str, tmp_path: Path) -> None:
    model = converted(name).eval()
    normswap.save(model, tmp_path / "model.safetensors")
    fresh = normswap.load(filled(net(), seed=7), tmp_path / "model.safetensors").eval()
    assert same_bits(fresh(image()), model(image()))


def test_a_loaded_model_goes_back_to_its_own_norms(tmp_path: Path) -> None:
    normswap.save(converted("gn"), tmp_path / "model.safetensors")
    fresh = normswap.revert(normswap.load(net(), tmp_path / "model.safetensors"))
    assert [type(m) for m in fresh.modules()] == [type(m) for m in net().modules()]


def test_it_loads_in_another_process(tmp_path: Path) -> None:
    model = normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "gn").eval()
    normswap.save(model, tmp_path / "m.safetensors")
    torch.save(model(image()), tmp_path / "y.pt")
    script = f"""
import torch, normswap
from torch import nn
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
folder = Path({str(tmp_path)!r})
model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
model = normswap.load(model, folder / "m.safetensors")
torch.save(model(torch.load(folder / "x.pt")), folder / "again.pt")
"""
    torch.save(image(), tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert same_bits(torch.load(tmp_path / "again.pt"), torch.load(tmp_path / "y.pt"))


def test_a_tensor_under_two_keys_is_written_once(tmp_path: Path) -> None:
    def shared() -> Any:
        norm = nn.BatchNorm2d(CHANNELS)
        return filled(nn.ModuleDict({"a": norm, "b": norm, "conv": nn.Conv2d(3, CHANNELS, 1)}))

    model = normswap.convert(shared(), "gn")
    normswap.save(model, tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a.weight", "a.bias", "conv.weight", "conv.bias"}
    fresh = normswap.load(shared(), tmp_path / "m.safetensors")
    assert fresh["a"] is fresh["b"]
    assert all(same_bits(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_parts_of_one_storage_are_written_alone(tmp_path: Path) -> None:
    model = normswap.convert(batch_net(), "gn")
    whole = torch.arange(2.0 * CHANNELS)
    model[1].weight = nn.Parameter(whole[:CHANNELS])
    model[1].bias = nn.Parameter(whole[CHANNELS:])
    normswap.save(model, tmp_path / "m.safetensors")
    assert same_bits(normswap.load(batch_net(), tmp_path / "m.safetensors")[1].bias, model[1].bias)


def test_a_model_that_was_not_converted(tmp_path: Path) -> None:
    model = batch_net()
    assert normswap.recipe(model)["norms"] == {}
    normswap.save(model, tmp_path / "m.safetensors")
    fresh = normswap.load(filled(batch_net(), seed=3), tmp_path / "m.safetensors")
    assert all(same_bits(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_a_class_that_is_not_registered_is_refused_with_the_way_out() -> None:
    class Own(nn.Module):
        def __init__(self, num_features: int) -> None:
            super().__init__()

        def forward(self, x: Any) -> Any:
            return x

    model = normswap.convert(batch_net(), Own)
    with pytest.raises(RecipeError, match="register"):
        normswap.recipe(model)


BAD = {
    "no recipe": {"norms": {}},
    "another version": {"normswap": 99, "norms": {}},
    "an unknown norm": {"normswap": 1, "norms": {"1": {"norm": "os.system", "options": {}}}},
    "an unknown option": {"normswap": 1, "norms": {"1": {"norm": "gn", "options": {"x": 1}}}},
    "another model": {"normswap": 1, "norms": {"layer9": {"norm": "gn", "options": {}}}},
    "not a norm there": {"normswap": 1, "norms": {"0": {"norm": "gn", "options": {}}}},
    "no options": {"normswap": 1, "norms": {"1": {"norm": "gn"}}},
    "a list": [1, 2],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_and_nothing_changes(name: str) -> None:
    model = batch_net()
    before, loaded = Snapshot(model), set(sys.modules)
    with pytest.raises(RecipeError):
        normswap.apply_recipe(model, BAD[name])
    before.assert_kept(model, untouched=True)
    assert set(sys.modules) == loaded


def test_an_option_that_does_not_fit_names_the_layer() -> None:
    recipe = {"normswap": 1, "norms": {"1": {"norm": "gn", "options": {"num_groups": 3}}}}
    model = batch_net()
    before = Snapshot(model)
    with pytest.raises(NormSwapError, match=r"1 \(BatchNorm2d\)"):
        normswap.apply_recipe(model, recipe)
    before.assert_kept(model, untouched=True)


@pytest.mark.parametrize("other", ["fewer channels", "another layer"])
def test_a_file_of_another_model_leaves_the_model_as_it_was(other: str, tmp_path: Path) -> None:
    normswap.save(normswap.convert(batch_net(), "gn"), tmp_path / "m.safetensors")
    models = {
        "fewer channels": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        "another layer": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(2, 2)),
    }
    model = models[other]
    before = Snapshot(model)
    with pytest.raises(NormSwapError):
        normswap.load(model, tmp_path / "m.safetensors")
    before.assert_kept(model)


def test_a_file_without_a_recipe(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(RecipeError, match=r"normswap\.save"):
        normswap.load(batch_net(), tmp_path / "m.safetensors")


def test_a_process_group_does_not_go_into_a_recipe() -> None:
    model = normswap.convert(SOURCES["BatchNorm2d"].model(), "sync_bn", process_group=object())
    with pytest.raises(RecipeError, match="process_group"):
        normswap.recipe(model)
