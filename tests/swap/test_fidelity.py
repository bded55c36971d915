"""The fidelity that a plan promises is the fidelity that is measured, no more and no less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.swap.helpers import (
    CHANNELS,
    HALVES,
    MIXTURES,
    OWN,
    OWN_BUFFERS,
    RETOLD,
    SOURCES,
    STARTING_OVER,
    TRACKING,
    TWICE,
    Source,
    batch_net,
    changing,
    filled,
    image,
    matched,
    numbers,
    outputs,
    pairs,
    same_bits,
    train_step,
)

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


def swap(model: nn.Module, target: str, **arguments: Any) -> nn.Module:
    return normswap.convert(model, target, where="*", **arguments)


def promised(model: nn.Module, target: str, **arguments: Any) -> str:
    """The one fidelity of all steps."""
    steps = normswap.plan(model, target, where="*", **arguments)
    (fidelity,) = {str(step.fidelity) for step in steps}
    return fidelity


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two double precision results differ by rounding only."""
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def measured(source: nn.Module, converted: nn.Module, x: Tensor) -> str:
    """The best fidelity that the outputs, and the statistics after training on them, bear out."""
    if not agree(outputs(source, x), outputs(converted, x)):
        return "less"
    one, other = copy.deepcopy(source).train(), copy.deepcopy(converted).train()
    with torch.no_grad():
        if not agree(one(x), other(x)):
            return "eval"
    before, after = one.state_dict(), other.state_dict()
    kept = [key for key in before if "running" in key or "batches" in key]
    kept = [key for key in kept if ".other_" not in key]  # of domains that no sample is of
    if not any(key in after for key in kept):
        kept = []  # none of what nothing moves is needed any more
    moved_alike = all(key in after and agree(before[key], after[key]) for key in kept)
    return "exact" if moved_alike else "eval"


def telling(source: Source, target: str) -> bool:
    """Whether the outputs tell: some, as they begin, evaluate as the identity, to the bit."""
    neutral = source.norm == "identity" and target in ("iter_norm", "an_wang", "batch_renorm")
    return changing(source, target) and not neutral


@pytest.mark.parametrize(("source", "target"), pairs(telling, every=True))
def test_exact_and_eval_are_promised_where_they_are_kept_and_nowhere_else(
    source: Source, target: str
) -> None:
    model = source.model().double()
    promise = promised(model, target)
    converted = swap(copy.deepcopy(model), target)
    # More samples than a ghost_bn takes together.
    x = torch.cat([model.example(seed=seed) for seed in range(10)])
    found = measured(model, converted, x.double() * 3 + 1)
    assert found == (promise if promise in ("exact", "eval") else "less")


EXACT = {
    "bn to sync_bn": (lambda: nn.BatchNorm2d(CHANNELS), "sync_bn", {}),
    "sync_bn to bn": (lambda: nn.SyncBatchNorm(CHANNELS), "bn", {}),
    "bn to synchronised bn": (lambda: nn.BatchNorm2d(CHANNELS), "bn", {"sync": True}),
    "untracked bn to sync_bn": (
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        "sync_bn",
        {},
    ),
    "cumulative bn to sync_bn": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), "sync_bn", {}),
    "in to gn with a group a channel": (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
        "gn",
        {"num_groups": CHANNELS},
    ),
    "gn with a group a channel to in": (lambda: nn.GroupNorm(CHANNELS, CHANNELS), "in", {}),
    "gn with one group to ln": (lambda: nn.GroupNorm(1, CHANNELS), "ln", {}),
    "ln on maps to gn with one group": (
        lambda: normswap.build("ln", CHANNELS),
        "gn",
        {"num_groups": 1},
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_same_function_is_exact(case: str) -> None:
    make, target, options = EXACT[case]
    model = filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), make())).double()
    assert promised(model, target, **options) == "exact"
    converted = swap(copy.deepcopy(model), target, **options)
    assert measured(model, converted, image().double()) == "exact"


EVAL = {
    "bn to frozen_bn": (lambda: nn.BatchNorm2d(CHANNELS), "frozen_bn", {}),
    "frozen_bn to bn": (lambda: normswap.build("frozen_bn", CHANNELS), "bn", {}),
    "bn to tracking in": (lambda: nn.BatchNorm2d(CHANNELS), "in", {"track_running_stats": True}),
    "tracking in to bn": (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        "bn",
        {},
    ),
}


@pytest.mark.parametrize("case", EVAL)
def test_the_same_running_statistics_are_eval(case: str) -> None:
    make, target, options = EVAL[case]
    model = filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), make())).double()
    assert promised(model, target, **options) == "eval"
    converted = swap(copy.deepcopy(model), target, **options)
    assert measured(model, converted, image().double()) == "eval"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("target", ["sync_bn", "frozen_bn"])
def test_evaluation_is_the_same_bit_for_bit(target: str, dim: int, dtype: torch.dtype) -> None:
    model = batch_net(dim=dim).to(dtype)
    x = numbers(4, 3, *[5] * dim).to(dtype)
    expected = outputs(model, x)
    assert same_bits(outputs(swap(model, target), x), expected)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_sync_bn_trains_as_bn_bit_for_bit(momentum: float | None) -> None:
    model = batch_net(momentum=momentum)
    other = swap(copy.deepcopy(model), "sync_bn")
    for step in range(3):
        for net in (model, other):
            train_step(net, image(seed=step), torch.optim.SGD(net.parameters(), lr=0.1))
    for key, value in model.state_dict().items():
        assert same_bits(other.state_dict()[key], value), key


# -- near ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", MIXTURES)
@pytest.mark.parametrize("source", ["BatchNorm2d", "SyncBatchNorm", "frozen_bn"])
def test_near_is_there_and_back_within_a_hundredth(source: str, target: str) -> None:
    model = SOURCES[source].model()
    x, before = model.example(), outputs(model, model.example())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert promised(model, target) == "near"
    swap(model, target)
    assert 0 < (outputs(model, x) - before).norm() < 0.01 * before.norm()
    assert promised(model, "bn") == "near"
    swap(model, "bn")
    assert (outputs(model, x) - before).norm() < 1e-6 * before.norm()
    assert all(same_bits(p, parameters[name]) for name, p in model.named_parameters())


# -- affine and fresh ---------------------------------------------------------------------------


def lesser(source: Source, target: str) -> str:
    """What can be promised at most where the two norms are different functions in eval mode."""
    if "identity" in (source.norm, target):
        return "fresh"
    if not source.tracks:
        return "affine"
    if source.norm in (*MIXTURES, *HALVES, *TWICE) or target not in (*TRACKING, *RETOLD, *MIXTURES):
        return "matched"
    if target in MIXTURES:
        return "matched" if source.norm == "ebn" else "near"
    return "affine"


@pytest.mark.parametrize(("source", "target"), pairs(changing))
def test_running_statistics_are_used_where_there_are_some(source: Source, target: str) -> None:
    promise = promised(source.model(), target)
    assert promise in ("exact", "eval", lesser(source, target))


@pytest.mark.parametrize(
    ("source", "target"),
    pairs(lambda s, t: changing(s, t) and lesser(s, t) == "affine" and not matched(s, t)),
)
def test_affine_means_weight_and_bias_as_they_were(source: Source, target: str) -> None:
    model = source.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    swap(model, target)
    after = dict(model.named_parameters())
    kept = [name for name in before if name.rpartition(".")[2] not in OWN.get(source.norm, ())]
    assert all(same_bits(after[name], before[name]) for name in kept)


@pytest.mark.parametrize(
    ("source", "target"), pairs(lambda s, target: changing(s, target) and target != "identity")
)
def test_carry_copy_never_rewrites_a_value(source: Source, target: str) -> None:
    model = source.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swap(model, target, carry="copy")
    after = model.state_dict()
    # Another norm may call its own the same, and mean something else.
    own = [*OWN.get(target, ()), *OWN_BUFFERS.get(target, ())]
    own += ["num_batches_tracked"] * (target in STARTING_OVER)
    carried = [key for key in before if key in after and key.rpartition(".")[2] not in own]
    assert all(same_bits(after[key], before[key]) for key in carried)


@pytest.mark.parametrize(("source", "target"), pairs(changing))
def test_carry_fresh_begins_anew(source: Source, target: str) -> None:
    model = source.model()
    assert promised(model, target, carry="fresh") == "fresh"
    swap(model, target, carry="fresh")
    start = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    start |= {f"other_{name}": start[name] for name in list(start)[2:]}
    start |= {"running_scale": 1, "running_wm": torch.eye(CHANNELS), "running_square": 1}
    start |= {"recent_squares": 0, "recent_products": 0, "steps": 0, "running_std": 1}
    for domain in ("source", "target"):
        start |= {f"running_mean_{domain}": 0, f"running_var_{domain}": 1}
    for norm in (model.norm1, model.norm2):
        for name, tensor in norm.state_dict().items():
            if name in (*OWN.get(target, ()), *OWN_BUFFERS.get(target, ())):
                continue
            assert (tensor == start[name]).all(), name


def test_carry_fresh_takes_a_layer_norm_over_c_h_w() -> None:
    """Its affine fits no other norm, so that only a fresh start is possible."""
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm((8, 6, 6))))
    swap(model, "gn", carry="fresh")
    assert model[1].weight.shape == (8,)
    assert outputs(model, image()).shape == (4, 8, 6, 6)


def test_another_eps_is_less_than_exact() -> None:
    model = batch_net().double()
    model[1].running_var.mul_(1e-4)
    assert promised(model, "sync_bn", eps=1e-2) not in ("exact", "eval")
    converted = swap(copy.deepcopy(model), "sync_bn", eps=1e-2)
    assert converted[1].eps == 1e-2
    assert measured(model, converted, image().double()) == "less"


def test_dropping_the_affine_carries_nothing() -> None:
    model = batch_net()
    assert promised(model, "sync_bn", affine=False) == "fresh"
    assert swap(model, "sync_bn", affine=False)[1].weight is None


# -- matched ------------------------------------------------------------------------------------


Statistics = tuple[Tensor, Tensor]


def of_groups(groups: int) -> Callable[[Tensor, Tensor], Statistics]:
    """Mean and variance that a group of channels of given statistics shows, for each channel."""

    def pooled(mean: Tensor, var: Tensor) -> Statistics:
        channels = len(mean) // groups
        group_mean = torch.stack([part.mean() for part in mean.split(channels)])
        group_second = torch.stack([part.mean() for part in (var + mean**2).split(channels)])
        group_var = group_second - group_mean**2
        return group_mean.repeat_interleave(channels), group_var.repeat_interleave(channels)

    return pooled


def of_squares(mean: Tensor, var: Tensor) -> Statistics:
    """The mean square of all channels; no mean is subtracted."""
    return torch.zeros_like(mean), (var + mean**2).mean().expand_as(var)


def of_positions(mean: Tensor, var: Tensor) -> Statistics:
    """Mean and variance over uncorrelated channels at one position."""
    second = (var + mean**2).mean()
    return mean.mean().expand_as(mean), second - mean.mean() ** 2 - var.mean() / len(var)


def matched_affine(
    norm: nn.Module, pooled: Callable[[Tensor, Tensor], Statistics], eps: float
) -> tuple[Tensor, Tensor]:
    """The formula: weight·sqrt(V + eps')/S, bias + weight·(M - mean)/S, in double precision."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    pooled_mean, pooled_var = pooled(mean, var)
    root = (var + norm.eps).sqrt()
    return (
        weight * (pooled_var + eps).sqrt() / root,
        bias + weight * (pooled_mean - mean) / root,
    )


MATCHED = {
    "gn, 1 group": ("gn", {"num_groups": 1}, of_groups(1)),
    "gn, 2 groups": ("gn", {"num_groups": 2}, of_groups(2)),
    "gn, 2 channels a group": ("gn", {"channels_per_group": 2}, of_groups(CHANNELS // 2)),
    "gn, 8 groups": ("gn", {"num_groups": 8}, of_groups(CHANNELS)),
    "gn, another eps": ("gn", {"num_groups": 2, "eps": 0.5}, of_groups(2)),
    "ln": ("ln", {}, of_groups(1)),
    "ln, another eps": ("ln", {"eps": 0.5}, of_groups(1)),
    "in": ("in", {}, of_groups(CHANNELS)),
    "in, another eps": ("in", {"eps": 0.5}, of_groups(CHANNELS)),
    "rms": ("rms", {}, of_squares),
    "rms, another eps": ("rms", {"eps": 0.5}, of_squares),
    "ln2d": ("ln2d", {}, of_positions),
    "rms2d": ("rms2d", {}, of_squares),
}

#: Those that pool over a whole sample, and so measure what was expected on a fitting one.
WHOLE = [case for case in MATCHED if not case.endswith("2d")]

#: Those for which a match is something else than a copy.
MIXING = [case for case in MATCHED if not case.startswith(("in", "gn, 8"))]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", MATCHED)
def test_matched_follows_the_formula(case: str, affine: bool) -> None:
    target, options, pooled = MATCHED[case]
    model = batch_net(affine=affine, eps=1e-3).double()
    weight, bias = matched_affine(model[1], pooled, options.get("eps", 1e-3))
    assert promised(model, target, **options) == "matched"
    swap(model, target, **options)
    got = [
        torch.ones(CHANNELS) if model[1].weight is None else model[1].weight,
        torch.zeros(CHANNELS) if model[1].bias is None else model[1].bias,
    ]
    torch.testing.assert_close(got[0].double(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1].double(), bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matching_is_computed_in_double_precision_and_rounded_once(dtype: torch.dtype) -> None:
    model = batch_net().to(dtype)
    weight, bias = matched_affine(model[1], of_groups(2), model[1].eps)
    swap(model, "gn", num_groups=2)
    torch.testing.assert_close(model[1].weight, weight.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(model[1].bias, bias.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("case", WHOLE)
def test_matched_equals_the_source_on_samples_of_the_expected_statistics(case: str) -> None:
    """Every channel of every sample has exactly the running mean and variance."""
    target, options, _ = MATCHED[case]
    norm = filled(nn.BatchNorm2d(CHANNELS)).double()
    noise = numbers(4, CHANNELS, 6, 5, dtype=torch.float64)
    noise = noise - noise.mean((2, 3), keepdim=True)
    noise = noise / noise.var((2, 3), keepdim=True, correction=0).sqrt()
    x = noise * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    expected = outputs(norm, x)
    converted = swap(norm, target, example_inputs=x, **options)
    assert agree(outputs(converted, x), expected)


@pytest.mark.parametrize("case", [case for case in MIXING if case in WHOLE])
def test_matched_is_nearer_to_the_source_than_a_copy(case: str) -> None:
    """On data whose statistics fit the running ones on average, not sample by sample."""
    target, options, _ = MATCHED[case]
    norm = filled(nn.BatchNorm2d(CHANNELS)).double()
    noise = numbers(64, CHANNELS, 8, 8, dtype=torch.float64)
    x = noise * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    expected = outputs(norm, x)
    error = {
        carry: (outputs(swap(copy.deepcopy(norm), target, carry=carry, **options), x) - expected)
        .square()
        .mean()
        for carry in ("auto", "copy")
    }
    assert error["auto"] < error["copy"] / 10


def test_matched_on_tokens_follows_the_formula_and_is_nearer() -> None:
    """A BatchNorm on tokens to a LayerNorm, which pools over the channels of one position."""
    model = filled(nn.Sequential(nn.Linear(3, 32), nn.LayerNorm(32))).double()
    swap(model, "bn")
    filled(model)
    norm = model[1]
    weight, bias = matched_affine(norm, of_positions, norm.eps)
    x = numbers(64, 9, 32, dtype=torch.float64) * norm.running_var.sqrt() + norm.running_mean
    expected = outputs(norm, x)
    copied = outputs(swap(copy.deepcopy(model), "ln", carry="copy")[1], x)
    assert promised(model, "ln") == "matched"
    swap(model, "ln")
    torch.testing.assert_close(model[1].weight, nn.Parameter(weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(model[1].bias, nn.Parameter(bias), rtol=0, atol=1e-12)
    matched = outputs(model[1], x)
    assert (matched - expected).square().mean() < (copied - expected).square().mean() / 2


def test_one_affine_of_two_norms_is_not_matched_twice() -> None:
    """Two norms that share weight and bias have one start; the promise has to hold for both."""
    model = filled(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    wanted = [matched_affine(norm, of_groups(1), norm.eps) for norm in model]
    plan = normswap.plan(model, "gn", num_groups=1)
    matched = [index for index, step in enumerate(plan) if step.fidelity == "matched"]
    plan.apply()
    for index in matched:
        torch.testing.assert_close(model[index].weight.double(), wanted[index][0].double())


def test_a_fresh_start_does_not_reach_another_layer_through_a_shared_affine() -> None:
    model = filled(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    before = model[1].weight.detach().clone()
    with pytest.raises(normswap.NormSwapError, match="another layer's too"):
        normswap.convert(model, "gn", where="0", carry="fresh")
    assert same_bits(model[1].weight, before)


# -- frozen -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["BatchNorm2d", "SyncBatchNorm"])
def test_frozen_bn_evaluates_in_train_mode_and_moves_nothing(source: str) -> None:
    model = SOURCES[source].model()
    evaluated = outputs(model, model.example())
    swap(model, "frozen_bn").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert same_bits(model(model.example()), evaluated)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


def test_no_gradient_reaches_a_frozen_affine_but_its_input() -> None:
    model = swap(batch_net(), "frozen_bn").train().requires_grad_(True)
    model(image()).square().sum().backward()
    assert model[1].weight.grad is None
    assert model[1].bias.grad is None
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_with_weight_decay_does_not_move_a_frozen_affine(optimizer: Any) -> None:
    model = batch_net()
    optimizer = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    swap(model, "frozen_bn")
    before = model[1].weight.clone()
    train_step(model, image(), optimizer)
    assert same_bits(model[1].weight, before)


def test_a_gradient_from_before_the_freeze_does_not_move_it() -> None:
    model = batch_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().sum().backward()
    swap(model, "frozen_bn")
    before = model[1].weight.clone()
    optimizer.step()
    assert same_bits(model[1].weight, before)


def test_a_built_frozen_bn_asks_for_no_gradient() -> None:
    """So that a wrapper for ranks does not wait for one."""
    assert not any(p.requires_grad for p in normswap.build("frozen_bn", CHANNELS).parameters())


@pytest.mark.parametrize("target", [*TRACKING[:2], "gn", "in", "ln"])
@pytest.mark.parametrize("trainable", [True, False])
def test_thawing_gives_the_flags_of_before(target: str, trainable: bool) -> None:
    model = batch_net()
    model[1].weight.requires_grad_(trainable)
    swap(model, "frozen_bn")
    assert not model[1].weight.requires_grad
    swap(model, target)
    assert model[1].weight.requires_grad is trainable
    assert model[1].bias.requires_grad


@pytest.mark.parametrize("target", ["bn", "sync_bn", "gn"])
def test_a_frozen_bn_that_never_was_anything_else_trains_once_thawed(target: str) -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), normswap.build("frozen_bn", CHANNELS)))
    swap(model, target)
    assert all(parameter.requires_grad for parameter in model.parameters())
