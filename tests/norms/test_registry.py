"""Naming norms: aliases, near misses, options, and the table of all."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from torch import nn

import normswap
from normswap.errors import CannotConvert, NormSwapError, OptionError, UnknownNorm

NAMES = ["bn", "sync_bn", "frozen_bn", "gn", "in", "ln", "ln2d", "rms", "rms2d", "identity"]
NAMES += ["dyt", "derf", "scale_norm", "l1_bn", "iter_norm", "lcn", "rn_l", "mabn"]
NAMES += ["an_wang", "power_norm"]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("batch_norm", "bn"),
        ("sync_batch_norm", "sync_bn"),
        ("frozen_batch_norm", "frozen_bn"),
        ("group_norm", "gn"),
        ("instance_norm", "in"),
        ("layer_norm", "ln"),
        ("rms_norm", "rms"),
        ("dynamic_tanh", "dyt"),
        ("dynamic_erf", "derf"),
        ("l1_batch_norm", "l1_bn"),
        ("local_context_norm", "lcn"),
        ("region_norm_learned", "rn_l"),
        ("iterative_normalization", "iter_norm"),
    ],
)
def test_the_long_name_means_the_same(alias: str, name: str) -> None:
    assert normswap.spec(alias) == normswap.spec(name)


def test_no_two_norms_share_a_name() -> None:
    names = [name for entry in normswap.list_norms() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["fold", "cosine", "pearson", "ws_gn", "cbn"])
def test_what_is_no_layer_by_itself_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(OptionError, match=r"normswap.convert\(nn.Sequential\(layer"):
        normswap.build(name, 8)


@pytest.mark.parametrize("name", ["BN", "Sync_BN", "GroupNorm"])
def test_case_does_not_matter(name: str) -> None:
    assert normswap.spec(name).name == normswap.spec(name.lower()).name


@pytest.mark.parametrize(("typo", "meant"), [("sync_nb", "sync_bn"), ("grup_norm", "group_norm")])
def test_a_near_miss_is_answered_with_what_was_meant(typo: str, meant: str) -> None:
    with pytest.raises(UnknownNorm, match=f"Did you mean.*'{meant}'"):
        normswap.spec(typo)


@pytest.mark.parametrize("name", ["xyzzy", "", 7, None])
def test_what_is_near_nothing_is_answered_with_all_there_is(name: object) -> None:
    known = ", ".join(entry.name for entry in normswap.list_norms())
    with pytest.raises(UnknownNorm, match=f"Known: {known}"):
        normswap.spec(name)  # type: ignore[arg-type]


def test_a_misspelt_option_is_answered_with_what_was_meant() -> None:
    with pytest.raises(OptionError, match=r"no option 'num_group'.*'num_groups'"):
        normswap.spec("gn", num_group=2)


def test_an_option_of_a_norm_without_options_is_refused() -> None:
    with pytest.raises(OptionError, match="It has none"):
        normswap.spec("identity", eps=1.0)


@pytest.mark.parametrize("error", [UnknownNorm, OptionError])
def test_the_errors_are_value_errors_of_the_library(error: type[Exception]) -> None:
    assert issubclass(error, NormSwapError)
    assert issubclass(error, ValueError)


def test_a_spec_survives_json() -> None:
    spec = normswap.spec("gn", num_groups=4, eps=1e-3)
    name, options = json.loads(json.dumps([spec.name, spec.options]))
    assert normswap.spec(name, **options) == spec


def test_a_spec_survives_pickling() -> None:
    spec = normswap.spec("gn", num_groups=4)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_spec_cannot_be_changed() -> None:
    spec = normswap.spec("gn")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "bn"  # type: ignore[misc]


def test_a_spec_does_not_share_the_options_it_was_made_from() -> None:
    options = {"num_groups": 4}
    spec = normswap.spec("gn", **options)
    options["num_groups"] = 8
    assert spec.options["num_groups"] == 4


def test_equal_specs_are_one_key() -> None:
    specs = {normswap.spec("gn", num_groups=4), normswap.spec("group_norm", num_groups=4)}
    assert len(specs) == 1


def test_specs_with_other_options_differ() -> None:
    assert normswap.spec("gn", num_groups=4) != normswap.spec("gn", num_groups=2)


def test_a_spec_prints_as_it_was_asked_for() -> None:
    assert str(normswap.spec("gn", num_groups=4)) == "gn(num_groups=4)"


def test_every_norm_is_listed() -> None:
    assert {entry.name for entry in normswap.list_norms()} >= set(NAMES)


def test_the_list_prints_names_aliases_options_and_papers() -> None:
    printed = str(normswap.list_norms())
    for entry in normswap.list_norms():
        for text in (entry.name, *entry.aliases, *(option.name for option in entry.options)):
            assert text in printed
    assert "1803.08494" in printed


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("bn", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
        ("in", (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
        ("gn", (nn.GroupNorm,) * 3),
        ("sync_bn", (nn.SyncBatchNorm,) * 3),
    ],
)
def test_a_built_norm_is_torchs_class_of_its_dimension(
    name: str, classes: tuple[type[nn.Module], ...], dim: int
) -> None:
    assert isinstance(normswap.build(name, 8, dim=dim), classes[dim - 1])


def test_two_dimensions_are_the_default() -> None:
    assert type(normswap.build("bn", 8)) is nn.BatchNorm2d


@pytest.mark.parametrize("name", ["bn", "in"])
def test_a_dimension_without_a_class_is_refused(name: str) -> None:
    with pytest.raises(CannotConvert):
        normswap.build(name, 8, dim=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_norm_can_be_read_back(name: str) -> None:
    assert normswap.find(normswap.build(name, 8))[0].state.norm == name


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("gn", {"eps": "big"}),
        ("gn", {"eps": -1.0}),
        ("gn", {"eps": float("nan")}),
        ("gn", {"eps": float("inf")}),
        ("bn", {"momentum": 2}),
        ("bn", {"sync": 1}),
        ("in", {"track_running_stats": "yes"}),
        ("ln", {"affine": 0}),
    ],
)
def test_a_value_that_an_option_cannot_have(norm: str, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"{norm}: {name}="):
        normswap.spec(norm, **options)
