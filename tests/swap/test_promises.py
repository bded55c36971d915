"""Every norm that has learned, to the norms that `test_matrix` leaves: those with a neighbourhood,
and to itself with another setting.

What is promised to be the same is, whatever numbers the source has come to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NormSwapError
from tests.extra import REQUIRING

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CHANNELS = 12
ENTRIES = [entry for entry in normswap.list_norms() if entry.name not in REQUIRING]
SOURCES = [entry.name for entry in ENTRIES if entry.stands_alone]
BESIDE = [entry.name for entry in ENTRIES if entry.needs & {"neighbours", "previous", "activation"}]
OTHERS = [
    normswap.spec("evonorm_s0", num_groups=2),
    normswap.spec("frn", activation="keep"),
    normswap.spec("bcn", num_groups=2),
]


def numbers(tensor: Tensor, seed: int) -> Tensor:
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))


def model_of(source: str, **options: Any) -> nn.Sequential:
    """A norm between convolutions, every parameter and statistic of it its own."""
    norm = normswap.build(source, CHANNELS, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.add_(0.3 * numbers(parameter, seed).to(parameter))
        for seed, buffer in enumerate(norm.buffers()):
            if buffer.is_floating_point() and buffer.shape == (CHANNELS,):
                buffer.add_(0.3 * numbers(buffer, seed).to(buffer))
    convs = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
    for seed, conv in enumerate(convs):
        nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(conv.bias)
    return nn.Sequential(convs[0], norm, nn.ReLU(), convs[1]).eval()


@pytest.mark.parametrize("target", [*BESIDE, *OTHERS], ids=str)
@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_what_is_promised_in_eval_mode_holds(source: str, target: str) -> None:
    model = model_of(source)
    x = numbers(torch.empty(8, CHANNELS, 6, 6), 7) * 4 - 1
    before = model(x)
    try:
        plan = normswap.plan(model, target, where="1")
        converted = plan.apply()
    except NormSwapError:
        return  # refused with a reason, which other tests read
    if all(step.fidelity in ("exact", "eval") for step in plan.of("convert")):
        assert float((converted(x) - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize(
    ("norm", "before", "after"),
    [
        ("sn", {"unbiased": False, "kappa": 0.0}, {"kappa": 0.0}),
        ("ssn", {"unbiased": False}, {}),
        ("rn_l", {"affine": False}, {"affine": True}),
        ("transnorm", {"affine": False}, {"affine": True}),
        ("batch_renorm", {}, {"eps": 1e-2}),
        ("iter_norm", {}, {"eps": 1e-2}),
        ("bcn", {"eps": 1e-2}, {"estimated": True}),
        ("frn", {"learned_eps": True}, {"learned_eps": True, "activation": "keep"}),
        ("evonorm_b0", {"affine": False}, {"affine": True}),
        ("dyt", {"affine": False}, {"affine": True}),
        ("lcn", {"affine": False}, {"affine": True}),
        ("mabn", {"affine": False}, {"affine": True}),
        ("power_norm", {"affine": False}, {"affine": True}),
    ],
)
@torch.no_grad()
def test_with_another_setting_what_is_promised_holds(
    norm: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    model = model_of(norm, **before)
    x = numbers(torch.empty(8, CHANNELS, 6, 6), 7) * 4 - 1
    outputs = {mode: _run(model, x, mode) for mode in (True, False)}
    try:
        plan = normswap.plan(model, normswap.spec(norm, **after), where="1")
    except NormSwapError:
        return  # refused with a reason
    (step,) = plan
    plan.apply()
    modes = {"exact": [True, False], "eval": [False]}.get(str(step.fidelity), [])
    for mode in modes:
        found, wanted = _run(model, x, mode), outputs[mode]
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def _run(model: nn.Module, x: Tensor, mode: bool) -> Tensor:
    with normswap.preserve_stats(model):
        y: Tensor = model.train(mode)(x)
    model.eval()
    return y


@pytest.mark.parametrize("var", [1.0, 1e-2, 1e-4, 1e-6])
@torch.no_grad()
def test_an_eps_outside_of_the_root_is_made_up_for(var: float) -> None:
    model = model_of("bn")
    model[1].running_var.fill_(var)
    x = numbers(torch.empty(8, CHANNELS, 6, 6), 7)
    before = model(x)
    plan = normswap.plan(model, normswap.spec("cbn", eps_outside=True), where="1")
    assert plan[0].fidelity == "eval"
    assert float((plan.apply()(x) - before).norm() / before.norm()) < 1e-5


MOVING = [e.name for e in ENTRIES if e.stands_alone and "momentum" in {o.name for o in e.options}]


@pytest.mark.parametrize("norm", MOVING)
@torch.no_grad()
def test_another_momentum_leaves_all_that_was_learned(norm: str) -> None:
    model = model_of(norm)
    x = numbers(torch.empty(8, CHANNELS, 6, 6), 7) * 4 - 1
    outputs = {mode: _run(model, x, mode) for mode in (True, False)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = normswap.plan(model, normswap.spec(norm, momentum=0.3), where="1")
    assert [str(step.fidelity) for step in plan] == ["exact"]
    plan.apply()
    assert model[1].momentum == 0.3
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for mode, wanted in outputs.items():
        assert torch.equal(_run(model, x, mode), wanted)


def test_what_was_held_fixed_stays_so_with_another_setting() -> None:
    model = model_of("ssn")
    model[1].mean_weight.requires_grad_(False)
    normswap.convert(model, normswap.spec("ssn", momentum=0.3), where="1")
    assert not model[1].mean_weight.requires_grad
    assert model[1].var_weight.requires_grad
