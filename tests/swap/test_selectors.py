"""What is converted: selectors, mappings, and the families that a target converts by itself."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import normswap
from tests.swap.helpers import CHANNELS, TARGETS, Snapshot, batch_net, filled, numbers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.gn = nn.GroupNorm(2, CHANNELS)

    def forward(self, x: Any) -> Any:
        return self.gn(self.conv2(self.bn(self.conv(x))))


class Hybrid(nn.Module):
    """Convolutions with BatchNorms below, tokens with LayerNorms above, as in MaxViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 2))

    def forward(self, x: Any) -> Any:
        return self.head(self.layer10(self.layer1(self.stem(x))).flatten(2).mT)


BATCH = {"stem.1", "layer1.0.bn", "layer1.1.bn", "layer10.0.bn"}
GROUP = {"layer1.0.gn", "layer1.1.gn", "layer10.0.gn"}
LAYER = {"head.0"}


def chosen(to: Any, **arguments: Any) -> set[str]:
    """Paths of what would be converted, or is already what was asked for."""
    plan = normswap.plan(filled(Hybrid()), to, **arguments)
    return {step.site.path for step in plan if step.action in ("convert", "already")}


# -- without where ------------------------------------------------------------------------------

DEFAULTS = {
    "bn": BATCH,
    "sync_bn": BATCH,
    "frozen_bn": BATCH,
    "ghost_bn": BATCH,
    "sn": BATCH,
    "ssn": BATCH,
    "l1_bn": BATCH,
    "mabn": BATCH,
    "an": BATCH,
    "bcn": BATCH,
    "batch_renorm": BATCH,
    "transnorm": BATCH,
    "lcn": BATCH,
    "an_wang": BATCH,
    "rn_l": BATCH,
    "iter_norm": BATCH,
    "cn": BATCH,
    "ebn": BATCH,
    "bin": BATCH,
    "ibn": BATCH,
    "adaptive_bn": BATCH,
    "iebn": BATCH,
    "dsbn": BATCH,
    "split_bn": BATCH,
    "adain": BATCH,
    "gn": BATCH | GROUP,
    "in": BATCH | GROUP,
    "ln": BATCH | GROUP | LAYER,
    "ln2d": BATCH | GROUP | LAYER,
    "rms": LAYER,
    "rms2d": BATCH | GROUP | LAYER,
    "dyt": LAYER,
    "derf": LAYER,
    "scale_norm": LAYER,
    "power_norm": LAYER,
    "identity": BATCH | GROUP | LAYER,
}


@pytest.mark.parametrize("target", sorted({*TARGETS, *DEFAULTS}))
def test_the_default_sources_of_a_target(target: str) -> None:
    assert chosen(target) == DEFAULTS[target]


def test_what_is_left_is_listed_with_a_reason() -> None:
    plan = normswap.plan(filled(Hybrid()), "sync_bn")
    left = {step.site.path: step.reason for step in plan if step.action == "leave"}
    assert set(left) == GROUP | LAYER
    assert "layer_norm is not a source of sync_bn" in left["head.0"]
    assert "where=" in left["head.0"]


def test_leaving_by_default_is_no_skip_and_no_warning() -> None:
    model = normswap.convert(filled(Hybrid()), "sync_bn", strict=True)
    assert isinstance(model.head[0], nn.LayerNorm)
    assert {row.path for row in normswap.report(model)} == BATCH


# -- where and skip -----------------------------------------------------------------------------

SELECTORS = {
    "path": ("stem.1", {"stem.1"}),
    "glob": ("layer1.*", {p for p in BATCH | GROUP if p.startswith("layer1.")}),
    "glob with a set": ("layer1.[1]*", {"layer1.1.bn", "layer1.1.gn"}),
    "everything": ("*", BATCH | GROUP | LAYER),
    "regex": (r"re:layer\d+\.0\.bn", {"layer1.0.bn", "layer10.0.bn"}),
    "kind": ("kind:layer_norm", LAYER),
    "kind by the name of a norm": ("kind:bn", BATCH),
    "kind by an alias": ("kind:groupnorm", GROUP),
    "type": (nn.GroupNorm, GROUP),
    "base type": (nn.modules.batchnorm._NormBase, BATCH),
    "predicate": (lambda site: site.path.endswith("gn"), GROUP),
    "predicate on the module": (lambda site: hasattr(site.module, "momentum"), BATCH),
    "list": (["stem.1", "kind:layer_norm"], {"stem.1"} | LAYER),
    "tuple": (("stem.1", nn.LayerNorm), {"stem.1"} | LAYER),
    "nested list": (["stem.1", ["head.0", nn.GroupNorm]], {"stem.1"} | LAYER | GROUP),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_where_selects_exactly(name: str) -> None:
    selector, paths = SELECTORS[name]
    assert chosen("identity", where=selector) == paths


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "everything"])
def test_skip_leaves_out_exactly(name: str) -> None:
    selector, paths = SELECTORS[name]
    assert chosen("identity", skip=selector) == (BATCH | GROUP | LAYER) - paths


def test_a_regex_means_the_whole_path() -> None:
    assert chosen("identity", where="re:.*0") == {"head.0"}


def test_skip_wins_over_where() -> None:
    assert chosen("gn", where="layer1.*", skip="*.gn") == {"layer1.0.bn", "layer1.1.bn"}


def test_where_reaches_beyond_the_default_sources() -> None:
    assert chosen("sync_bn", where="*") == BATCH | GROUP | LAYER


def test_every_name_of_a_norm_selects_it() -> None:
    model = filled(Hybrid())
    model.other_name = model.stem[1]
    assert normswap.convert(model, "gn", where="other_name") is model
    assert model.stem[1] is model.other_name
    assert isinstance(model.stem[1], nn.GroupNorm)


def test_every_name_of_a_norm_leaves_it_out() -> None:
    model = filled(Hybrid())
    model.other_name = model.stem[1]
    normswap.convert(model, "gn", skip="other_name")
    assert isinstance(model.stem[1], nn.BatchNorm2d)


def test_the_model_itself_is_selected_by_a_star() -> None:
    assert isinstance(normswap.convert(nn.BatchNorm2d(8), "gn", where="*"), nn.GroupNorm)


# -- mappings -----------------------------------------------------------------------------------


def became(to: Any, **arguments: Any) -> dict[str, str]:
    """What each site would become, by path; what is left alone is left out."""
    plan = normswap.plan(filled(Hybrid()), to, **arguments)
    return {step.site.path: step.to.name for step in plan if step.to is not None}


def test_the_first_match_of_a_mapping_wins() -> None:
    found = became({"layer1.*": "in", "kind:batch_norm": "sync_bn", "*": "ln"})
    assert found == {
        "stem.1": "sync_bn",
        "layer1.0.bn": "in",
        "layer1.0.gn": "in",
        "layer1.1.bn": "in",
        "layer1.1.gn": "in",
        "layer10.0.bn": "sync_bn",
        "layer10.0.gn": "ln",
        "head.0": "ln",
    }


def test_none_in_a_mapping_leaves_alone() -> None:
    found = became({"layer1.*": None, nn.BatchNorm2d: "gn"})
    assert found == {"stem.1": "gn", "layer10.0.bn": "gn"}


def test_what_no_key_of_a_mapping_means_is_left_alone() -> None:
    assert became({"stem.*": "gn"}) == {"stem.1": "gn"}


def test_a_mapping_of_specs_with_options() -> None:
    model = filled(Hybrid())
    to = {"stem.*": normswap.spec("gn", num_groups=4), "layer1.0.bn": normswap.spec("gn")}
    normswap.convert(model, to)
    assert model.stem[1].num_groups == 4
    assert model.layer1[0].bn.num_groups == 1


def test_where_and_skip_narrow_a_mapping() -> None:
    to = {"kind:batch_norm": "gn", "*": "ln"}
    assert became(to, where="layer1.*", skip="*.1.*") == {"layer1.0.bn": "gn", "layer1.0.gn": "ln"}


def test_a_spec_with_options_beside() -> None:
    model = normswap.convert(batch_net(), normswap.spec("gn", num_groups=4), eps=0.5)
    assert (model[1].num_groups, model[1].eps) == (4, 0.5)


@pytest.mark.parametrize("name", ["sync_bn", "SYNC_BN", "sync_batch_norm", "SyncBN"])
def test_names_and_aliases_in_any_case(name: str) -> None:
    assert isinstance(normswap.convert(batch_net(), name)[1], nn.SyncBatchNorm)


# -- the same call twice ------------------------------------------------------------------------

CALLS = {
    "default": ("gn", {}),
    "type": ("gn", {"where": nn.BatchNorm2d}),
    "kind": ("gn", {"where": "kind:batch_norm"}),
    "glob": ("sync_bn", {"where": "layer1.*.bn"}),
    "predicate": ("gn", {"where": lambda site: site.kind == "batch_norm"}),
    "skip by type": ("identity", {"skip": nn.LayerNorm}),
    "options": ("gn", {"num_groups": 2}),
    "mapping": ({"layer1.*": None, nn.BatchNorm2d: "gn", "*": "ln"}, {}),
    "mapping by kind": ({"kind:batch_norm": "gn", "kind:group_norm": "in"}, {}),
    "copy": ("gn", {"carry": "copy"}),
    "fresh": ("gn", {"carry": "fresh"}),
}


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_twice_equals_once(name: str) -> None:
    to, arguments = CALLS[name]
    model = normswap.convert(filled(Hybrid()), to, **arguments)
    once, report = Snapshot(model), list(normswap.report(model))
    normswap.convert(model, to, **arguments)
    once.assert_kept(model, untouched=True)
    assert list(normswap.report(model)) == report


def test_another_option_is_another_conversion() -> None:
    model = normswap.convert(batch_net(), "gn", num_groups=2)
    assert normswap.convert(model, "gn", num_groups=4)[1].num_groups == 4


def test_without_options_any_norm_of_the_kind_will_do() -> None:
    model = normswap.convert(batch_net(), "gn", num_groups=2)
    assert normswap.convert(model, "gn")[1].num_groups == 2


def test_process_group_of_an_earlier_call_is_kept() -> None:
    group = object()
    model = normswap.convert(batch_net(), "sync_bn", process_group=group)
    assert normswap.convert(model, "sync_bn")[1].process_group is group


# -- the dimension ------------------------------------------------------------------------------

BATCH_CLASSES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_CLASSES = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SHAPES = {1: (2, 8, 5), 2: (2, 8, 5, 4), 3: (2, 8, 5, 4, 3)}

every_dim = pytest.mark.parametrize("dim", [1, 2, 3])


@every_dim
@pytest.mark.parametrize("middle", ["sync_bn", "frozen_bn", "in", "identity", "gn", "ln"])
@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
def test_the_dimension_of_the_original_class_is_known_again(middle: str, dim: int) -> None:
    """Nothing but the norm itself, converted and back, tells how many dimensions there are."""
    model = nn.Sequential(BATCH_CLASSES[dim](CHANNELS))
    normswap.convert(normswap.convert(model, middle), "bn", where="*")
    assert isinstance(model[0], BATCH_CLASSES[dim])


@every_dim
@pytest.mark.parametrize("name", ["sync_bn", "frozen_bn", "in", "identity"])
@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
def test_the_dimension_for_which_a_norm_was_built_is_known(name: str, dim: int) -> None:
    model = nn.Sequential(normswap.build(name, CHANNELS, dim=dim))
    assert isinstance(normswap.convert(model, "bn", where="*")[0], BATCH_CLASSES[dim])


@every_dim
def test_the_dimension_of_the_producing_convolution(dim: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    for target, classes in (("bn", BATCH_CLASSES), ("in", INSTANCE_CLASSES)):
        model = nn.Sequential(conv(3, 8, 1), nn.SyncBatchNorm(8))
        assert isinstance(normswap.convert(model, target)[1], classes[dim])


@every_dim
def test_the_dimension_of_a_producing_transposed_convolution(dim: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    model = nn.Sequential(conv(3, 8, 1), nn.SyncBatchNorm(8))
    assert isinstance(normswap.convert(model, "bn")[1], BATCH_CLASSES[dim])


@every_dim
def test_the_dimension_of_example_inputs(dim: int) -> None:
    model = nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(8))
    normswap.convert(model, "bn", example_inputs=numbers(*SHAPES[dim]))
    assert isinstance(model[1], BATCH_CLASSES[dim])


def test_example_inputs_without_positions_make_a_batch_norm_1d() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.SyncBatchNorm(8))
    normswap.convert(model, "bn", example_inputs=numbers(4, 3))
    assert isinstance(model[1], nn.BatchNorm1d)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_the_forms_of_example_inputs(wrap: Any) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.SyncBatchNorm(8)

        def forward(self, x: Any) -> Any:
            return self.norm(x)

    model = normswap.convert(Only(), "bn", example_inputs=wrap(numbers(*SHAPES[2])))
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_one_norm_after_two_convolutions_has_their_dimension() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm = nn.SyncBatchNorm(8)

        def forward(self, x: Any) -> Any:
            return self.norm(self.b(self.norm(self.a(x))))

    assert isinstance(normswap.convert(Shared(), "bn").norm, nn.BatchNorm2d)


def test_where_nothing_tells_the_dimension_the_site_is_skipped() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(8), nn.Conv2d(8, 8, 1), nn.SyncBatchNorm(8))
    with pytest.warns(normswap.NormSwapWarning, match="give example_inputs"):
        normswap.convert(model, "bn")
    assert [type(m) for m in model] == [nn.SyncBatchNorm, nn.Conv2d, nn.BatchNorm2d]
