"""Going back: every class, setting, hook, key and value, from wherever the model is by then."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normswap
from tests.swap.helpers import (
    COPIES,
    FEW,
    FORGETTING,
    HOOKS,
    OWN,
    OWN_BUFFERS,
    RESCALED,
    RETOLD,
    SOURCES,
    TARGETS,
    TRACKING,
    Doubled,
    MapNet,
    Snapshot,
    Source,
    batch_net,
    changing,
    image,
    matched,
    numbers,
    outputs,
    pairs,
    same_bits,
    same_state,
    train_step,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

OTHERS = [name for name in TARGETS if name != "bn"]

every_change = pytest.mark.parametrize(("source", "target"), pairs(changing))


def swap(model: nn.Module, target: str, **arguments: Any) -> nn.Module:
    return normswap.convert(model, target, where="*", **arguments)


def decorated(model: Any) -> Any:
    """Give a model hooks of all sorts, modes, attributes and flags to lose."""
    norm = model.norm1
    for register in HOOKS.values():
        register(norm, lambda *_: None)
    norm.tag = ["mine"]
    norm.register_buffer("extra", torch.tensor([1.0]))
    model.norm2.eval()
    for parameter in model.norm2.parameters():
        parameter.requires_grad_(False)
    return model


@every_change
def test_everything_comes_back(source: Source, target: str) -> None:
    model = decorated(source.model())
    before = Snapshot(model)
    assert normswap.revert(swap(model, target)) is model
    before.assert_kept(model)
    assert list(normswap.report(model)) == []


def lacks_statistics(model: nn.Module) -> bool:
    """Whether there is nothing to freeze the model's norms at."""
    return not any(name.endswith("running_mean") for name, _ in model.named_buffers())


@pytest.mark.parametrize("last", TARGETS)
@pytest.mark.parametrize("middle", TARGETS)
@pytest.mark.parametrize("source", ["BatchNorm2d", "LayerNorm"])
def test_the_first_original_comes_back_over_two_conversions(
    source: str, middle: str, last: str
) -> None:
    model = decorated(SOURCES[source].model())
    before = Snapshot(model)
    for target in (middle, last):
        if not (target == "frozen_bn" and lacks_statistics(model)):
            swap(model, target, example_inputs=model.example())
    normswap.revert(model)
    before.assert_kept(model)


def test_an_unconverted_model_stays_as_it_is() -> None:
    model = batch_net()
    before = Snapshot(model)
    assert normswap.revert(model) is model
    before.assert_kept(model, untouched=True)


@every_change
def test_values_carried_unchanged_keep_what_training_made_of_them(
    source: Source, target: str
) -> None:
    """After exact and eval conversions the trained weights and statistics are the original's."""
    model = source.model()
    fidelity = {step.fidelity for step in normswap.plan(model, target, where="*")}
    swap(model, target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, model.example(), optimizer)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    normswap.revert(model)
    now = model.state_dict()
    names = (*OWN.get(source.norm, ()), *OWN_BUFFERS.get(source.norm, ()))
    own = {f"{norm}.{name}" for norm in ("norm1", "norm2") for name in names}
    carried = {key for key in now if key in trained} - rewritten(source, target) - own
    every = set(now) - rewritten(source, target) - own
    assert fidelity - {"exact", "eval"} or carried == every
    for key in carried:
        assert same_bits(now[key], trained[key]), key


@pytest.mark.parametrize(("source", "target"), pairs(lambda s, t: changing(s, t) and matched(s, t)))
def test_values_that_the_start_rewrote_come_back(source: Source, target: str) -> None:
    model = source.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swap(model, target)
    train_step(model, model.example(), torch.optim.SGD(model.parameters(), lr=0.1))
    normswap.revert(model)
    now = model.state_dict()
    for key in rewritten(source, target) & set(before):
        assert same_bits(now[key], before[key]), key


def rewritten(source: Source, target: str) -> set[str]:
    """Keys of what a start writes anew.

    These are weight and bias where it matches moments other than the channel's, and running
    statistics that one of the two keeps in terms of its own, or that are not kept.
    """
    names = ["weight", "bias"] if matched(source, target) else []
    for norm in (source.norm, target):
        if norm in RETOLD:
            names += [*RETOLD[norm], "running_mean", "running_var"]
    if target in FORGETTING:
        names += ["running_mean", "running_var", "num_batches_tracked"]
    return {f"norm{i}.{name}" for i in (1, 2) for name in names}


def test_training_in_the_middle_of_a_chain() -> None:
    """bn, sync_bn (trained: carried), gn (trained: rewritten): back to the end of sync_bn."""
    model = SOURCES["BatchNorm2d"].model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap(model, "sync_bn")
    train_step(model, model.example(), optimizer)
    middle = {key: value.clone() for key, value in model.state_dict().items() if "norm" in key}
    swap(model, "gn")
    train_step(model, model.example(), optimizer)
    normswap.revert(model)
    for key, value in middle.items():
        assert same_bits(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("source", "target", "dtype"),
    [
        *((*pair.values, torch.float64) for pair in pairs(changing)),
        *((*pair.values, torch.float16) for pair in pairs(changing, FEW)),
        *((*pair.values, torch.bfloat16) for pair in pairs(changing, FEW)),
    ],
)
def test_it_comes_back_in_the_models_present_precision(
    source: Source, target: str, dtype: torch.dtype
) -> None:
    model, expected = source.model(), source.model().to(dtype)
    parameters = dict(model.named_parameters())
    normswap.revert(swap(model, target).to(dtype))
    assert same_state(model, expected)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_without_affine_comes_back_in_the_models_present_precision(target: str) -> None:
    """Also where the new norm has no tensor of its own that could tell the precision."""
    model, expected = batch_net(affine=False), batch_net(affine=False).double()
    normswap.revert(swap(model, target).double())
    assert same_state(model, expected)
    assert outputs(model, image().double()).dtype == torch.float64


def test_a_change_of_precision_in_the_middle_of_a_chain() -> None:
    model, expected = SOURCES["BatchNorm2d"].model(), SOURCES["BatchNorm2d"].model().double()
    swap(model, "gn")
    model.double()
    swap(model, "identity")
    normswap.revert(model)
    assert same_state(model, expected)


@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn", "gn", "identity"])
def test_from_the_meta_device_to_a_real_one(target: str) -> None:
    """A model that was converted before its weights were there can go back once they are."""
    model = swap(SOURCES["BatchNorm2d"].model().to("meta"), target).to_empty(device="cpu")
    normswap.revert(model)
    assert type(model.norm1) is nn.BatchNorm2d
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.load_state_dict(SOURCES["BatchNorm2d"].model().state_dict())


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("source", "target"), pairs(changing, FEW))
def test_a_copy_goes_back_by_itself(source: Source, target: str, way: str) -> None:
    original = source.model()
    model = swap(source.model(), target)
    clone = COPIES[way](model)
    converted = Snapshot(model)
    normswap.revert(clone)
    converted.assert_kept(model, untouched=True)
    assert [type(m) for m in clone.modules()] == [type(m) for m in original.modules()]
    assert same_state(clone, original)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in clone.parameters()}


def test_of_a_part_of_a_converted_model() -> None:
    model = nn.ModuleDict({"a": batch_net(), "b": batch_net()})
    before_a, norm_b = Snapshot(model["a"]), model["b"][1]
    swap(model, "gn")
    assert normswap.revert(model["a"]) is model["a"]
    before_a.assert_kept(model["a"])
    assert isinstance(model["b"][1], nn.GroupNorm)
    normswap.revert(model)
    assert model["b"][1] is norm_b


def test_conversions_of_parts_go_back_together() -> None:
    model = nn.ModuleDict({"a": batch_net(), "b": batch_net()})
    before = Snapshot(model)
    swap(model["a"], "gn")
    swap(model["b"], "sync_bn")
    swap(model, "frozen_bn", skip="a.*")
    normswap.revert(model)
    before.assert_kept(model)


@pytest.mark.parametrize("target", OTHERS)
def test_an_optimizer_made_before_trains_the_reverted_model(target: str) -> None:
    model = SOURCES["BatchNorm2d"].model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normswap.revert(swap(model, target))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, model.example(), optimizer)
    assert all(not same_bits(p, before[name]) for name, p in model.named_parameters())


def test_statistics_trained_in_the_middle_of_a_chain_after_a_move() -> None:
    """A move gives the norm other buffers; what was trained in them is what comes back."""
    model = SOURCES["BatchNorm2d"].model()
    swap(model, "sync_bn").double()
    model(model.example().double())
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    swap(model, "gn")
    normswap.revert(model)
    for name, buffer in model.named_buffers():
        assert same_bits(buffer, statistics[name]), name


def test_what_was_rewritten_twice_comes_back_as_it_was_first() -> None:
    model = SOURCES["BatchNorm2d"].model()
    before = Snapshot(model.norm1)
    for target in ("gn", "bn", "ln"):
        plan = normswap.plan(model, target, where="*", example_inputs=model.example())
        assert {str(step.fidelity) for step in plan} == {"affine" if target == "bn" else "matched"}
        plan.apply()
        train_step(model, model.example(), torch.optim.SGD(model.parameters(), lr=0.1))
    normswap.revert(model)
    before.assert_kept(model.norm1)


def test_the_mode_is_the_models_present_one() -> None:
    model = SOURCES["BatchNorm2d"].model()
    swap(model, "gn").eval()
    normswap.revert(model)
    assert not any(module.training for module in model.modules())


def test_weights_loaded_with_assign_come_back() -> None:
    """``load_state_dict(assign=True)`` puts other Parameter objects in the norm's place."""
    model, other = SOURCES["BatchNorm2d"].model(), SOURCES["BatchNorm2d"].model(seed=9)
    swap(model, "sync_bn").load_state_dict(other.state_dict(), assign=True)
    normswap.revert(model)
    assert same_state(model, other)


@pytest.mark.parametrize("target", OTHERS)
def test_a_hook_given_to_the_converted_norm_fires_after(target: str) -> None:
    """Hooks belong to the place: what was registered in between is still called, and removable."""
    model = SOURCES["BatchNorm2d"].model()
    calls: list[str] = []
    swap(model, target)
    handles = [
        model.norm1.register_forward_hook(lambda *_: calls.append("forward")),
        model.norm1.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    normswap.revert(model)
    model(model.example()).sum().backward()
    assert calls == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    model(model.example()).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("target", OTHERS)
def test_a_handle_given_before_removes_its_hook_after(target: str) -> None:
    model = SOURCES["BatchNorm2d"].model()
    calls: list[str] = []
    handle = model.norm1.register_forward_hook(lambda *_: calls.append("forward"))
    normswap.revert(swap(model, target))
    model(model.example())
    handle.remove()
    model(model.example())
    assert calls == ["forward"]


@pytest.mark.parametrize("target", [name for name in TRACKING[1:] if name not in RESCALED])
def test_a_parametrization_comes_back(target: str) -> None:
    model = batch_net()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    before = Snapshot(model)
    normswap.revert(swap(model, target))
    before.assert_kept(model)


def test_a_chain_forgets_the_norms_in_between() -> None:
    """However often a model is converted, it holds the first originals only."""
    model = SOURCES["BatchNorm2d"].model()
    sizes = []
    for _ in range(3):
        swap(swap(model, "gn"), "sync_bn", example_inputs=model.example())
        sizes.append(len(pickle.dumps(model)))
    assert sizes[1] == sizes[2]


def test_a_deep_copy_taken_before_stays_unconverted() -> None:
    model: MapNet = SOURCES["BatchNorm2d"].model()
    clone = copy.deepcopy(model)
    before = Snapshot(clone)
    swap(model, "gn")
    with torch.no_grad():
        model.norm1.weight.copy_(numbers(8))
    normswap.revert(model)
    before.assert_kept(clone, untouched=True)
