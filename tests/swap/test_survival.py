"""What survives a swap, for every norm as a source and every norm as a target."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.swap.helpers import (
    CHANNELS,
    COPIES,
    FEW,
    HOOKS,
    KEEPING,
    OWN,
    OWN_BUFFERS,
    RETOLD,
    SOURCES,
    TARGETS,
    TRACKING,
    UNIQUE,
    Snapshot,
    Source,
    TokenNet,
    changing,
    matched,
    on_load,
    outputs,
    pairs,
    same_bits,
    same_state,
    train_step,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

every_pair = pytest.mark.parametrize(("source", "target"), pairs())
every_change = pytest.mark.parametrize(("source", "target"), pairs(changing))
some_changes = pytest.mark.parametrize(("source", "target"), pairs(changing, FEW))
every_tracking_pair = pytest.mark.parametrize(
    ("source", "target"),
    pairs(lambda s, target: s.tracks and s.norm not in RETOLD and target in TRACKING),
)


def swap(model: nn.Module, target: str, **arguments: Any) -> nn.Module:
    return normswap.convert(model, target, where="*", **arguments)


def affine_of(source: Source, target: str) -> list[str]:
    """What of weight and bias the new norm has: as the source, and what a match needs."""
    if target == "identity":
        return []
    if target != source.norm and (source.norm == "identity" or matched(source, target)):
        return ["weight", "bias"]
    return [name for name in ("weight", "bias") if name in source.tensors]


@every_pair
def test_the_model_and_its_other_modules_stay_the_same_objects(source: Source, target: str) -> None:
    model = source.model()
    others = {path: m for path, m in model.named_modules() if "norm" not in path}
    order = list(model._modules)
    assert swap(model, target) is model
    assert list(model._modules) == order
    assert {path: m for path, m in model.named_modules() if "norm" not in path} == others


@every_change
def test_the_norm_becomes_what_was_asked(source: Source, target: str) -> None:
    model = swap(source.model(), target)
    torch_class = {
        "bn": nn.modules.batchnorm._BatchNorm,
        "sync_bn": nn.SyncBatchNorm,
        "gn": nn.GroupNorm,
        "in": nn.modules.instancenorm._InstanceNorm,
        "ln": nn.LayerNorm if source.net is TokenNet else nn.GroupNorm,
        "identity": nn.Identity,
    }
    for norm in (model.norm1, model.norm2):
        assert isinstance(norm, torch_class.get(target, nn.Module))
    assert {normswap.spec(target).entry.kind} == {site.kind for site in normswap.find(model)}


@pytest.mark.parametrize(("source", "target"), pairs(lambda _, target: target != "identity"))
def test_affine_parameters_are_the_same_objects(source: Source, target: str) -> None:
    model = source.model()
    before = dict(model.named_parameters())
    after = dict(swap(model, target).named_parameters())
    for name, parameter in before.items():
        if target == source.norm or name.rpartition(".")[2] not in OWN.get(source.norm, ()):
            assert after[name] is parameter


@every_tracking_pair
def test_running_statistics_are_carried_in_the_same_memory(source: Source, target: str) -> None:
    model = source.model()
    before = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in model.named_buffers()}
    after = dict(swap(model, target).named_buffers())
    shared = [
        [name for name in names if name.rpartition(".")[2] not in OWN_BUFFERS.get(norm, ())]
        for names, norm in ((before, source.norm), (after, target))
    ]
    assert shared[0] == shared[1]
    before = {name: before[name] for name in shared[0]}
    for name, (memory, value) in before.items():
        assert after[name].data_ptr() == memory
        assert same_bits(after[name], value)


@every_pair
def test_state_dict_keys(source: Source, target: str) -> None:
    """A tensor that survives keeps its key, and only state of the new norm gets new keys."""
    model = source.model()
    before = [key for key in model.state_dict() if not key.startswith("norm")]
    running = ["running_mean", "running_var", "num_batches_tracked"]
    tracks = source.tracks if target == source.norm else target in KEEPING
    affine = affine_of(source, target)
    expected = affine + list(OWN.get(target, ()) if affine or target != "dsbn" else ())
    expected += list(RETOLD[target]) if target in RETOLD else running * tracks
    expected += OWN_BUFFERS.get(target, ())
    after = list(swap(model, target).state_dict())
    assert [key for key in after if not key.startswith("norm")] == before
    assert [key for key in after if key.startswith("norm1.")] == [f"norm1.{k}" for k in expected]
    assert [key for key in after if key.startswith("norm2.")] == [f"norm2.{k}" for k in expected]


@every_pair
def test_a_checkpoint_of_the_source_fits_what_survives(source: Source, target: str) -> None:
    checkpoint = source.model(seed=5).state_dict()
    model = swap(source.model(), target)
    common = {key: value for key, value in checkpoint.items() if key in model.state_dict()}
    model.load_state_dict(common, strict=False)
    for key, value in common.items():
        assert same_bits(model.state_dict()[key], value)


@every_pair
def test_mode_settings_and_attributes(source: Source, target: str) -> None:
    model = source.model()
    model.norm2.eval()
    model.norm1.tag = tag = ["mine"]
    model.norm1.register_buffer("extra", torch.tensor([1.0, 2.0]))
    model.norm1.register_buffer("unsaved", torch.tensor([3.0]), persistent=False)
    eps, momentum = getattr(model.norm1, "eps", None), getattr(model.norm1, "momentum", None)
    swap(model, target)
    assert (model.training, model.norm1.training, model.norm2.training) == (True, True, False)
    assert model.norm1.tag is tag
    assert "norm1.extra" in model.state_dict()
    assert "norm1.unsaved" not in model.state_dict()
    assert model.norm1.unsaved.tolist() == [3.0]
    if eps is not None and hasattr(model.norm1, "eps"):
        assert model.norm1.eps == eps
    if momentum is not None and hasattr(model.norm1, "momentum"):
        assert model.norm1.momentum == momentum


@pytest.mark.parametrize("source", ["BatchNorm2d", "SyncBatchNorm", "frozen_bn"])
@pytest.mark.parametrize("target", TRACKING)
def test_momentum_none_is_a_cumulative_average_still(source: str, target: str) -> None:
    model = SOURCES[source].model()
    model.norm1.momentum = None
    assert swap(model, target).norm1.momentum is None


@pytest.mark.parametrize(("source", "target"), pairs(lambda source, _: source.norm != "frozen_bn"))
def test_requires_grad(source: Source, target: str) -> None:
    """What was frozen stays frozen; nothing but a frozen_bn freezes what was not."""
    model = source.model()
    for parameter in model.norm2.parameters():
        parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    swap(model, target)
    for name, parameter in model.named_parameters():
        frozen = target == "frozen_bn" and name.startswith("norm")
        if name in before and name.rpartition(".")[2] not in OWN.get(target, ()):
            assert parameter.requires_grad == (before[name] and not frozen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_change
def test_new_tensors_have_the_dtype_of_the_model(
    source: Source, target: str, dtype: torch.dtype
) -> None:
    model = swap(source.model().to(dtype), target)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    assert outputs(model, model.example().to(dtype)).dtype == dtype


@some_changes
def test_a_model_on_the_meta_device_is_not_materialised(source: Source, target: str) -> None:
    model = swap(source.model().to("meta"), target)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@every_tracking_pair
def test_memory_shared_by_two_norms_stays_shared(source: Source, target: str) -> None:
    model = source.model()
    model.norm2.running_mean = model.norm1.running_mean
    swap(model, target)
    assert model.norm2.running_mean is model.norm1.running_mean


@every_pair
def test_one_object_under_several_names_stays_one_object(source: Source, target: str) -> None:
    model = source.model()
    model.norm2 = model.norm1
    model.again = nn.ModuleList([nn.ModuleDict({"deep": model.norm1})])
    swap(model, target, example_inputs=model.example())
    assert model.norm1 is model.norm2 is model.again[0]["deep"]
    assert {normswap.spec(target).entry.kind} == {site.kind for site in normswap.find(model)}


@every_pair
def test_the_root_itself_may_be_a_norm(source: Source, target: str) -> None:
    root = source.make()
    shape = (4, 7, CHANNELS) if source.net is TokenNet else (4, CHANNELS, 6, 5)
    result = swap(root, target, example_inputs=torch.zeros(shape))
    assert {site.kind for site in normswap.find(result)} == {normswap.spec(target).entry.kind}
    assert (result is root) == (source.norm == target)
    assert normswap.revert(result) is root


@every_pair
def test_twice_equals_once(source: Source, target: str) -> None:
    model = swap(source.model(), target)
    once = Snapshot(model)
    report = list(normswap.report(model))
    swap(model, target)
    once.assert_kept(model, untouched=True)
    assert list(normswap.report(model)) == report


@pytest.mark.parametrize("way", COPIES)
@some_changes
def test_copies_answer_the_same(source: Source, target: str, way: str) -> None:
    model = swap(source.model(), target)
    clone = COPIES[way](model)
    assert same_state(model, clone)
    for train in (False, True):
        x = model.example(seed=3)
        assert same_bits(outputs(clone, x, train=train), outputs(model, x, train=train))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in clone.parameters()}


@some_changes
def test_an_averaged_copy_can_be_kept(source: Source, target: str) -> None:
    """torch's AveragedModel, for EMA and SWA, works on a converted model."""
    model = swap(source.model(), target)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert same_state(average.module, model)


@pytest.mark.parametrize(
    ("source", "target"), pairs(lambda s, target: changing(s, target) and s.norm not in UNIQUE)
)
def test_an_optimizer_made_before_trains_the_converted_model(source: Source, target: str) -> None:
    model = source.model()
    # The decay moves what has a slope of zero, up to rounding: a bias before a norm.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train_step(model, model.example(), optimizer)
    swap(model, target)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    train_step(model, model.example(seed=1), optimizer)
    moved = {name for name, p in model.named_parameters() if not same_bits(p, before[name])}
    frozen = {n for n in before if target == "frozen_bn" and n.startswith("norm")}
    fresh = {name for name, p in model.named_parameters() if id(p) not in known}
    assert moved == set(before) - frozen - fresh
    if {"weight", "bias"} <= set(source.tensors):
        assert {name.rpartition(".")[2] for name in fresh} == set(OWN.get(target, ()))


@every_change
def test_hooks_are_kept_and_their_handles_remove_them(source: Source, target: str) -> None:
    """Each is called once, in torch's order, and told that its module is the new norm."""
    model = source.model()
    calls: list[str] = []
    owners: list[nn.Module] = []

    def note(kind: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            calls.append(kind)
            owners.append(module)

        return hook

    def use() -> None:
        model(model.example()).sum().backward()
        model.load_state_dict(model.state_dict())

    handles = [register(model.norm1, note(kind)) for kind, register in HOOKS.items()]
    swap(model, target)
    use()
    assert calls == list(HOOKS)
    assert {id(owner) for owner in owners} == {id(model.norm1)}
    calls.clear()
    for handle in handles:
        handle.remove()
    use()
    assert calls == []


@some_changes
def test_hooks_of_a_copy_are_the_copys(source: Source, target: str) -> None:
    """A hook that is told its module is told the copy's norm, and goes only from the copy."""
    model = source.model()
    owners: list[nn.Module] = []
    on_load(model.norm1, lambda module, *_: owners.append(module))
    swap(model, target)
    clone = copy.deepcopy(model)
    clone.load_state_dict(clone.state_dict())
    assert [id(owner) for owner in owners] == [id(clone.norm1)]


@pytest.mark.parametrize("target", TARGETS)
def test_inplace_false_converts_a_copy(target: str) -> None:
    model = SOURCES["GroupNorm" if target == "bn" else "BatchNorm2d"].model()
    before = Snapshot(model)
    result = swap(model, target, inplace=False)
    before.assert_kept(model, untouched=True)
    assert {normswap.spec(target).entry.kind} == {site.kind for site in normswap.find(result)}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in result.parameters()}
