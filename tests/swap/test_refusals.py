"""What is refused, each with an error that says what and how, and a model left as it was."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import normswap
from normswap.errors import (
    DegeneratePooling,
    NormSwapError,
    NothingMatched,
    NothingToConvert,
    OptionError,
    TooUnfaithful,
    UnknownNorm,
    UnsupportedModel,
)
from tests.swap.helpers import (
    CHANNELS,
    TARGETS,
    Doubled,
    NormReLU,
    Snapshot,
    batch_net,
    filled,
    image,
    numbers,
)


def refused(
    model: nn.Module, error: type[NormSwapError], *said: str, to: Any = "gn", **arguments: Any
) -> None:
    """Assert that plan and convert raise the error, say all of this, and touch nothing."""
    before = Snapshot(model)
    for call in (normswap.plan, normswap.convert):
        with pytest.raises(error) as raised:
            call(model, to, **arguments)
        assert isinstance(raised.value, NormSwapError)
        assert isinstance(raised.value, ValueError)
        for part in said:
            assert part in str(raised.value)
        before.assert_kept(model, untouched=True)


# -- names and options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"), [("syncbatchnorm", "sync_batchnorm"), ("gnn", "gn"), ("frozenn", "frozen")]
)
def test_an_unknown_name_with_the_nearest_suggested(name: str, meant: str) -> None:
    refused(batch_net(), UnknownNorm, repr(name), "Did you mean", meant, to=name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    refused(batch_net(), UnknownNorm, "xyzzy", *TARGETS, to="xyzzy")


def test_an_unknown_name_in_a_mapping() -> None:
    refused(batch_net(), UnknownNorm, "gnn", to={"*": "gnn"})


@pytest.mark.parametrize("target", TARGETS)
def test_an_option_that_the_norm_does_not_have(target: str) -> None:
    refused(batch_net(), OptionError, target, "no option 'grops'", to=target, grops=2)


def test_a_misspelt_option_with_the_nearest_suggested() -> None:
    refused(batch_net(), OptionError, "num_group", "Did you mean 'num_groups'", num_group=2)


def test_an_option_of_another_target_of_the_mapping() -> None:
    to = {"1": "gn", "*": "sync_bn"}
    refused(batch_net(), OptionError, "sync_bn has no option 'num_groups'", to=to, num_groups=2)


@pytest.mark.parametrize("size", [3, 0, -1, 16, 2.0, "2"])
@pytest.mark.parametrize("option", ["num_groups", "channels_per_group"])
def test_a_number_of_groups_that_does_not_divide(option: str, size: Any) -> None:
    said = (f"{option}={size!r}", "does not divide", "[1, 2, 4, 8]", "1 (BatchNorm2d)")
    refused(batch_net(), OptionError, *said, **{option: size})


def test_both_ways_of_giving_groups() -> None:
    said = ("num_groups", "channels_per_group", "exclude each other")
    refused(batch_net(), OptionError, *said, num_groups=2, channels_per_group=4)


@pytest.mark.parametrize("carry", ["bogus", None, 1])
def test_a_carry_that_there_is_not(carry: Any) -> None:
    refused(batch_net(), OptionError, repr(carry), '"auto"', '"copy"', '"fresh"', carry=carry)


def test_a_fidelity_that_there_is_not() -> None:
    refused(batch_net(), OptionError, "'best'", "exact", "eval", "fresh", min_fidelity="best")


# -- selectors ----------------------------------------------------------------------------------


def resnetlike() -> nn.ModuleDict:
    return nn.ModuleDict({"layer1": batch_net(), "layer2": batch_net()})


@pytest.mark.parametrize("argument", ["where", "skip"])
def test_a_selector_that_matches_nothing_with_near_misses(argument: str) -> None:
    said = (f"{argument}='layer1.l'", "none of the 2", "'layer1.1'")
    refused(resnetlike(), NothingMatched, *said, **{argument: "layer1.l"})


def test_a_key_of_a_mapping_that_matches_nothing() -> None:
    refused(resnetlike(), NothingMatched, "layer3.*", to={"layer3.*": None, "*": "gn"})


def test_a_part_of_a_list_that_matches_nothing() -> None:
    refused(resnetlike(), NothingMatched, "layer9.*", where=["layer1.*", "layer9.*"])


def test_a_kind_that_the_model_does_not_have() -> None:
    said = ("kind:layer_norm", "There are batch_norm")
    refused(resnetlike(), NothingMatched, *said, where="kind:layer_norm")


def test_a_type_that_the_model_does_not_have() -> None:
    refused(resnetlike(), NothingMatched, "LayerNorm", "BatchNorm2d", where=nn.LayerNorm)


def test_a_predicate_that_accepts_nothing() -> None:
    refused(resnetlike(), NothingMatched, "2 normalizations", where=lambda site: False)


def test_a_regular_expression_that_is_none() -> None:
    refused(resnetlike(), OptionError, "re:layer(", "regular expression", where="re:layer(")


@pytest.mark.parametrize("selector", [3, 1.5, object()])
def test_a_selector_that_is_none(selector: Any) -> None:
    refused(resnetlike(), OptionError, "is no selector", "a glob", where=selector)


# -- nothing to do ------------------------------------------------------------------------------


def test_a_model_without_norms() -> None:
    refused(nn.Sequential(nn.Linear(3, 3)), NothingToConvert, "no normalization")


def test_nothing_to_convert_says_what_there_is_and_how_to_select_it() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.GroupNorm(2, 8))
    said = ("2 layer_norm", "1 group_norm", 'where="kind:layer_norm"', 'where="*"')
    refused(model, NothingToConvert, *said, to="sync_bn")


@pytest.mark.parametrize("to", [{}, {"*": None}], ids=["empty", "all left alone"])
def test_a_mapping_that_converts_nothing(to: Any) -> None:
    refused(resnetlike(), NothingToConvert, "2 batch_norm", to=to)


def test_everything_left_out() -> None:
    refused(resnetlike(), NothingToConvert, skip="*")


def test_nothing_of_what_was_chosen_can_be_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NormReLU(8))
    refused(model, NothingToConvert, "1 (NormReLU)", "overrides the forward of BatchNorm2d")


# -- demands ------------------------------------------------------------------------------------


def test_a_min_fidelity_that_cannot_be_kept() -> None:
    said = ("min_fidelity='eval'", "1 (BatchNorm2d)", "matched")
    refused(batch_net(), TooUnfaithful, *said, min_fidelity="eval")


def test_a_min_fidelity_alone_lets_a_site_be_skipped() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)))
    plan = normswap.plan(model, "frozen_bn", where="*", min_fidelity="eval")
    assert [step.action for step in plan] == ["convert", "skip"]


def test_a_min_fidelity_that_one_of_many_cannot_keep() -> None:
    model = nn.ModuleDict({"a": batch_net(), "b": batch_net()})
    to = {"a.*": "sync_bn", "b.*": "gn"}
    refused(model, TooUnfaithful, "b.1 (BatchNorm2d)", to=to, min_fidelity="exact")


@pytest.mark.parametrize(
    ("target", "least"), [("sync_bn", "exact"), ("frozen_bn", "eval"), ("gn", "matched")]
)
def test_a_min_fidelity_that_is_kept(target: str, least: str) -> None:
    normswap.convert(batch_net(), target, min_fidelity=least)


def test_strict_with_a_norm_that_must_be_skipped() -> None:
    said = ("2 (NormReLU)", "overrides the forward")
    refused(batch_net(NormReLU(8)), TooUnfaithful, *said, strict=True)


def test_strict_with_nothing_to_skip() -> None:
    model = normswap.convert(batch_net(NormReLU(8)), "gn", strict=True, skip="2")
    assert isinstance(model[1], nn.GroupNorm)


# -- models -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_module() -> None:
    refused(torch.jit.script(batch_net()), UnsupportedModel, "ScriptModule", "convert the model")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_module_in_a_model() -> None:
    model = nn.Sequential(torch.jit.script(batch_net()), nn.BatchNorm2d(8))
    refused(model, UnsupportedModel, "0 (", "ScriptModule", "convert the model")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_model_wrapped_in_ddp() -> None:
    model = DistributedDataParallel(batch_net())
    refused(model, UnsupportedModel, "DistributedDataParallel", "convert first, then wrap")


def test_a_model_wrapped_in_fsdp() -> None:
    class Wrapped(FullyShardedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.inner = module

    refused(Wrapped(batch_net()), UnsupportedModel, "convert first, then wrap")


def test_a_compiled_model() -> None:
    refused(torch.compile(batch_net()), UnsupportedModel, "compiled", "then compile")


def test_a_model_compiled_in_place() -> None:
    model = batch_net()
    model.compile()
    refused(model, UnsupportedModel, "compiled", "convert first, then compile")


def test_a_compiled_part() -> None:
    model = nn.Sequential(torch.compile(batch_net()), nn.BatchNorm2d(8))
    refused(model, UnsupportedModel, "0 (", "compiled")


def test_a_lazy_norm_that_has_seen_no_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d())
    refused(model, UnsupportedModel, "1 (LazyBatchNorm2d)", "run one batch", to="sync_bn")


def test_a_lazy_norm_that_is_left_out_is_no_obstacle() -> None:
    model = batch_net().append(nn.LazyBatchNorm2d())
    normswap.convert(model, "sync_bn", skip="2")
    assert isinstance(model[1], nn.SyncBatchNorm)


def test_a_lazy_norm_after_its_first_batch() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d())
    model(image())
    normswap.convert(model, "sync_bn")
    assert model[1].num_features == 8
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "GroupNorm", "InstanceNorm2d"])
def test_a_quantized_norm(name: str) -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    made = {
        "BatchNorm2d": lambda: quantized.BatchNorm2d(8),
        "LayerNorm": lambda: quantized.LayerNorm(8, None, None, 1.0, 0),
        "GroupNorm": lambda: quantized.GroupNorm(2, 8, None, None, 1.0, 0),
        "InstanceNorm2d": lambda: quantized.InstanceNorm2d(8, None, None, 1.0, 0),
    }
    model = nn.Sequential(nn.Conv2d(3, 8, 1), made[name]())
    refused(model, UnsupportedModel, f"1 ({name})", "quantized", "before quantizing", where="*")


def test_a_batch_norm_fused_for_quantization_aware_training() -> None:
    """The fused convolution reads the statistics of the BatchNorm in it."""
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    fused = qat.ConvBn2d(3, 8, 1, qconfig=quantization.get_default_qat_qconfig("fbgemm"))
    refused(nn.Sequential(fused), UnsupportedModel, "0", "before quantizing")


@pytest.mark.parametrize("model", [None, "resnet18", nn.ReLU, {"weight": 1}], ids=str)
@pytest.mark.parametrize("call", [normswap.plan, normswap.convert])
def test_what_is_no_model(call: Any, model: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.nn\.Module"):
        call(model, "gn")


@pytest.mark.parametrize("call", [normswap.find, normswap.revert, normswap.report])
def test_what_is_no_model_elsewhere(call: Any) -> None:
    with pytest.raises(NormSwapError, match=r"torch\.nn\.Module"):
        call("resnet18")


# -- sites --------------------------------------------------------------------------------------


def test_a_site_whose_dimension_nothing_tells() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8))
    refused(model, NothingToConvert, "how many dimensions", "example_inputs", to="bn", where="*")


def test_a_batch_norm_without_statistics_cannot_be_frozen() -> None:
    model = batch_net(track_running_stats=False)
    refused(model, NothingToConvert, "no running statistics", "warmup", to="frozen_bn")


def test_a_layer_norm_over_c_h_w_has_an_affine_of_its_own() -> None:
    model = filled(nn.Sequential(nn.LayerNorm((8, 6, 6))))
    refused(model, NothingToConvert, "(8, 6, 6)", 'carry="fresh"', where="*")


def test_a_layer_norm_over_c_h_w_is_one_already() -> None:
    model = nn.Sequential(nn.LayerNorm((8, 6, 6)))
    before = Snapshot(model)
    before.assert_kept(normswap.convert(model, "ln"), untouched=True)


def test_a_parametrized_weight_cannot_be_rewritten() -> None:
    model = batch_net()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    refused(model, NothingToConvert, "parametrized", 'carry="copy"', to="gn")


def test_a_weight_that_a_hook_recomputes() -> None:
    model = batch_net()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[1])
    refused(model, NothingToConvert, "weight", "recomputed by a hook", to="sync_bn")


def test_a_forward_that_was_replaced_on_the_instance() -> None:
    model = batch_net()
    model[1].forward = lambda x: x
    refused(model, NothingToConvert, "forward was replaced", to="sync_bn")


# -- pooling over one value ---------------------------------------------------------------------


def pooled() -> Any:
    """A norm on a map of one position."""
    norm = nn.BatchNorm2d(CHANNELS)
    return filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.AdaptiveAvgPool2d(1), norm))


DEGENERATE = [("gn", {"num_groups": CHANNELS}), ("in", {})]


@pytest.mark.parametrize(("target", "options"), DEGENERATE)
def test_degenerate_pooling_with_example_inputs(target: str, options: dict[str, int]) -> None:
    said = ("2 (BatchNorm2d)", "(4, 8, 1, 1)", "single value", "skip=")
    arguments = {"to": target, "example_inputs": image(), **options}
    refused(pooled(), NothingToConvert, *said, **arguments)


@pytest.mark.parametrize(("target", "options"), DEGENERATE)
def test_degenerate_pooling_at_the_first_forward(target: str, options: dict[str, int]) -> None:
    model = normswap.convert(pooled(), target, **options)
    with pytest.raises(DegeneratePooling, match=r"^2 \(.*single value"):
        model(image())


@pytest.mark.parametrize(("target", "options"), DEGENERATE)
def test_the_path_in_the_error_goes_with_copies(target: str, options: dict[str, int]) -> None:
    file = io.BytesIO()
    torch.save(normswap.convert(nn.ModuleDict({"deep": pooled()}), target, **options), file)
    file.seek(0)
    with pytest.raises(DegeneratePooling, match=r"^deep\.2 "):
        torch.load(file, weights_only=False)["deep"](image())


def test_batch_norm_over_one_value_with_example_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 8))
    said = ("(1, 8, 1, 1)", "single value")
    arguments = {"to": "bn", "where": "*", "example_inputs": image(batch=1)}
    refused(model, NothingToConvert, *said, **arguments)


def test_pooling_over_several_values_is_not_degenerate() -> None:
    model = normswap.convert(pooled(), "gn", num_groups=4, example_inputs=image())
    assert model(image()).shape == (4, 8, 1, 1)


def test_a_sample_without_a_batch_dimension_is_not_degenerate() -> None:
    """torch's InstanceNorm takes (C, L) too: eight channels, each pooled over five values."""
    x = numbers(8, 5)
    assert torch.equal(normswap.build("in", 8, dim=1)(x), nn.InstanceNorm1d(8, affine=True)(x))
