"""Every norm that takes an extra input follows its formula, in 1, 2 and 3 dimensions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import InputError, OptionError
from tests.norms.beyond import buffers_of, equal, parameters_of
from tests.norms.conditioned import CASES, CHANNELS, SAMPLES, SHAPES, Conditioned
from tests.reference.data import close, values

SEED = 3
PAIRS = [
    pytest.param(case, shape, id=f"{case}-{len(shape) - 2}d") for case in CASES for shape in SHAPES
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def prepared(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies; what is floating point takes gradients."""
    return {
        name: value.detach().clone().requires_grad_() if _is_float(value) else value
        for name, value in inputs.items()
    }


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed direction's share of y; zero where nothing flows."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    direction = values(*y.shape, seed=1)
    found = torch.autograd.grad(
        y, list(wanted.values()), direction, allow_unused=True, materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


def tensors_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if _is_float(value)}


@each_mode
@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_outputs_and_gradients_are_the_formulas(
    case: Conditioned, shape: tuple[int, ...], training: bool
) -> None:
    norm = case.build(len(shape) - 2).train(training)
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    x, other = values(*shape).requires_grad_(), values(*shape).requires_grad_()
    given, theirs = prepared(case.inputs(shape)), prepared(case.inputs(shape))
    torch.default_generator.manual_seed(SEED)
    y = norm(x, **given)
    torch.default_generator.manual_seed(SEED)
    expected = case.formula(other, parameters, buffers, training, **theirs)
    close(y, expected)
    found = gradients(y, {"x": x, **dict(norm.named_parameters()), **tensors_of(given)})
    for name, gradient in gradients(
        expected, {"x": other, **parameters, **tensors_of(theirs)}
    ).items():
        close(found[name], gradient)


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_three_train_steps_leave_what_the_formula_keeps(
    case: Conditioned, shape: tuple[int, ...]
) -> None:
    norm = case.build(len(shape) - 2)
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    for step in range(3):
        x = values(*shape, seed=20 + step)
        torch.default_generator.manual_seed(SEED)
        norm(x, **case.inputs(shape))
        torch.default_generator.manual_seed(SEED)
        case.formula(x, parameters, buffers, True, **case.inputs(shape))
    for name, buffer in norm.named_buffers():
        close(buffer, buffers[name])


@each_case
def test_eval_leaves_what_is_kept(case: Conditioned) -> None:
    norm, shape = case.build().eval(), SHAPES[1]
    before = buffers_of(norm)
    norm(values(*shape).requires_grad_(), **case.inputs(shape)).sum().backward()
    assert equal(buffers_of(norm), before)


@each_mode
@each_case
def test_numerical_gradients(case: Conditioned, training: bool) -> None:
    norm, shape = case.build().train(training), (SAMPLES, CHANNELS, 2, 3)
    buffers, given = buffers_of(norm), prepared(case.inputs(shape))
    names, told = [name for name, _ in norm.named_parameters()], list(tensors_of(given))

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        parameters = dict(zip(names, tensors, strict=False))
        inputs = given | dict(zip(told, tensors[len(names) :], strict=True))
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        torch.default_generator.manual_seed(SEED)
        return torch.func.functional_call(norm, parameters | kept, (x,), inputs)

    parts = [p.detach().clone() for p in norm.parameters()]
    inputs = [values(*shape), *parts, *(given[name].detach().clone() for name in told)]
    inputs = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each_mode
@each_case
def test_half_precision_gives_half_precision(case: Conditioned, training: bool) -> None:
    norm, shape = case.build().float().train(training), SHAPES[1]
    given = {n: v.float() if _is_float(v) else v for n, v in case.inputs(shape).items()}
    other = copy.deepcopy(norm)
    torch.default_generator.manual_seed(SEED)
    expected = other(values(*shape).bfloat16().float(), **given)
    torch.default_generator.manual_seed(SEED)
    y = norm(values(*shape).bfloat16(), **given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0.01, atol=0.01)


@each_case
def test_it_compiles_to_one_graph(case: Conditioned) -> None:
    torch._dynamo.reset()  # or the many cases of one forward exceed what it keeps
    norm, shape = case.build(), SHAPES[1]
    torch.default_generator.manual_seed(SEED)
    expected = copy.deepcopy(norm)(values(*shape), **case.inputs(shape))
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    torch.default_generator.manual_seed(SEED)
    close(compiled(values(*shape), **case.inputs(shape)), expected)


@each_case
def test_copies_and_pickles_are_the_same_norm(case: Conditioned) -> None:
    norm, shape = case.build().eval(), SHAPES[1]
    torch.default_generator.manual_seed(SEED)
    y = norm(values(*shape), **case.inputs(shape))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm)
        torch.default_generator.manual_seed(SEED)
        assert torch.equal(other(values(*shape), **case.inputs(shape)), y)


@each_case
def test_what_has_learned_to_follow_is_no_source(case: Conditioned) -> None:
    learned = normswap.find(case.build())[0].state.obstacle
    fresh = normswap.find(normswap.build(case.norm, CHANNELS, **case.options))[0].state.obstacle
    shared = case.norm == "split_bn" and "affine" not in case.options
    assert not fresh
    assert bool(learned) is not shared


# -- starts ---------------------------------------------------------------------------------------


def trained() -> nn.Module:
    """A small net whose norms have seen some data, and differ from their defaults."""
    torch.default_generator.manual_seed(SEED)
    net = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        x = values(8, 3, 9, 9, seed=step).float()
        optimizer.zero_grad()
        (net(x) - x[:, :1, 2:-2, 2:-2]).square().mean().backward()
        optimizer.step()
    return net


#: Where the start promises the source's outputs, whatever the extra input.
EXACT = [
    case
    for case in CASES
    if case.norm in ("dsbn", "split_bn", "cond_bn")
    or (case.norm in ("spade", "sean", "cond") and case.options.get("base", "bn") == "bn")
]


@each_mode
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_a_trained_net_starts_as_it_was(case: Conditioned, training: bool) -> None:
    net, x = trained().train(training), values(SAMPLES, 3, 9, 9, seed=9).float()
    (step, _) = normswap.plan(net, case.norm, **case.options)
    assert step.fidelity == "exact"
    expected = copy.deepcopy(net)
    if training and case.norm in ("dsbn", "split_bn"):
        y, given = expected(x), {}
    else:
        y, given = expected(x), case.inputs((SAMPLES, CHANNELS, 5, 5))
        given = {n: v.float() if _is_float(v) else v for n, v in given.items()}
    keys = list(net.state_dict())
    normswap.convert(net, case.norm, **case.options)
    torch.testing.assert_close(net(x, **given), y, rtol=1e-6, atol=1e-6)
    assert set(keys) <= set(net.state_dict())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    normswap.revert(net)
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net.eval()(x), expected.eval()(x), rtol=1e-5, atol=1e-5)


@each_case
def test_everything_it_gains_learns(case: Conditioned) -> None:
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    normswap.convert(net, case.norm, **case.options)
    x, given = values(SAMPLES, 3, 3, 4).float(), case.inputs(SHAPES[1])
    given = {n: v.float() if _is_float(v) else v for n, v in given.items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        (net(x, **given) - 1).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())  # or DDP would wait
        optimizer.step()
    assert all(not torch.equal(p, before[f"1.{name}"]) for name, p in net[1].named_parameters())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "options", "words"),
    [
        ("cond_bn", {}, "num_classes= for label=, or condition_dim="),
        ("cond", {"num_classes": 3, "condition_dim": 4}, "not both"),
        ("cond", {"num_classes": 3, "base": "dyt"}, "base='dyt' is none of bn, in"),
        ("cond", {"num_classes": 3, "num_groups": 2}, "num_groups= is no option of base='bn'"),
        ("cond", {"num_classes": 3, "base": "gn", "sync": True}, "pools over no batch"),
        ("rn_b", {"per_sample": True, "sync": True}, "leave out sync or per_sample"),
        ("spade", {}, "num_labels="),
        ("sean", {}, "num_labels="),
        ("adacon", {}, "style_dim="),
        ("spade", {"num_labels": 3, "kernel_size": 2}, "an odd number"),
        ("adacon", {"style_dim": 3, "kernel_size": 1}, "odd number from 3"),
        ("split_bn", {"affine": "own"}, '"shared" or "separate"'),
    ],
)
def test_options_that_do_not_fit_are_refused(
    norm: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        normswap.build(norm, CHANNELS, **options)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.norm not in ("dsbn", "split_bn")], ids=str
)
def test_an_input_without_default_is_asked_for(case: Conditioned) -> None:
    with pytest.raises(InputError, match=f"{next(iter(case.inputs(SHAPES[1])))}="):
        case.build()(values(*SHAPES[1]))


def test_one_value_of_a_domain_is_refused() -> None:
    norm = normswap.build("dsbn", CHANNELS, dim=1)
    with pytest.raises(normswap.NormSwapError, match="single value"):
        norm(values(3, CHANNELS).float(), domain=torch.tensor([0, 0, 1]))
    norm.eval()(values(3, CHANNELS).float(), domain=torch.tensor([0, 0, 1]))


def test_a_map_of_other_dimensions_is_refused() -> None:
    norm = normswap.build("spade", CHANNELS, num_labels=3)
    with pytest.raises(InputError, match="dimensions of positions"):
        norm(values(2, CHANNELS, 3, 3).float(), segmap=torch.zeros(2, 3, dtype=torch.long))
