"""timm's norms that no target is like: EvoNorm, filter response norm, SimpleNorm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.errors import StatisticsError

layers = pytest.importorskip("timm.layers")
from timm.layers import evo_norm, norm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CHANNELS = 32
BATCH_FORMS = [f"EvoNorm2dB{form}" for form in "012"]
OF_SAMPLES = [f"EvoNorm2dS{form}" for form in ("0", "0a", "1", "1a", "2", "2a")]
SIMPLE = ["SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32"]


def evonorm(form: str, **options: Any) -> Any:
    made = getattr(evo_norm, form)(CHANNELS, **({"groups": 8} | options))
    return _filled(made)


def _filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return module


def around(module: nn.Module) -> Any:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 1), module, nn.Conv2d(CHANNELS, 4, 1)).eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def group_norm(x: Tensor, module: Any, groups: int) -> Tensor:
    return F.group_norm(x, groups, module.weight, module.bias, module.eps)


@torch.no_grad()
def keeps_promises(model: Any, target: str, wanted: Any, **options: Any) -> Any:
    """Convert, compare with what is wanted of the norm's input, revert; returns the new norm."""
    x, before, parameters = picture(), model(picture()), dict(model.named_parameters())
    keys, old = list(model.state_dict()), model[1]
    normswap.convert(model, target, where="1", **options)
    new = model[1]
    assert torch.allclose(model(x), model[2](wanted(model[0](x), old)), atol=1e-5)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    normswap.revert(again)
    assert torch.equal(again(x), before)
    normswap.revert(model)
    assert model[1] is old
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), before)
    return new


@pytest.mark.parametrize("form", [*BATCH_FORMS, *OF_SAMPLES])
def test_an_evonorm_becomes_a_norm_and_an_activation(form: str) -> None:
    act = F.relu if form in BATCH_FORMS else F.silu
    model = around(evonorm(form))
    (site,) = normswap.find(model)
    assert site.kind == "evonorm"
    assert site.activation == "1.act"
    new = keeps_promises(model, "gn", lambda x, old: act(group_norm(x, old, 4)), num_groups=4)
    assert set(dict(new.named_parameters())) == {"weight", "bias"}
    keeps_promises(model, "identity", lambda x, old: act(x))


@pytest.mark.parametrize("form", [*BATCH_FORMS, *OF_SAMPLES])
def test_an_evonorm_without_activation_becomes_a_norm_alone(form: str) -> None:
    model = around(evonorm(form, apply_act=False))
    assert normswap.find(model)[0].activation is None
    keeps_promises(model, "gn", lambda x, old: group_norm(x, old, 4), num_groups=4)
    keeps_promises(model, "identity", lambda x, old: x)


def test_an_evonorm_keeps_the_activation_that_it_was_made_with() -> None:
    model = around(evonorm("EvoNorm2dS1", act_layer=nn.GELU))
    act = model[1].act
    normswap.convert(model, "gn", where="1")
    assert model[1].act is act
    assert isinstance(act, nn.GELU)


def test_ours_stands_for_the_same_activation() -> None:
    model = around(evonorm("EvoNorm2dS0"))
    normswap.convert(model, "evonorm_s0", where="1", num_groups=8)
    assert isinstance(model[1].replaced_act, nn.SiLU)
    normswap.convert(model, "gn", where="1")
    assert isinstance(getattr(model[1], model[1].tail[0]), nn.SiLU)


def test_a_filter_response_norm_is_ours_with_the_same_threshold() -> None:
    model = around(_filled(layers.FilterResponseNormTlu2d(CHANNELS)))
    tau, x = model[1].tau, picture()
    before = model(x)
    (step,) = normswap.plan(model, "frn", where="1").of("convert")
    assert step.fidelity == "exact"
    normswap.convert(model, "frn", where="1")
    assert model[1].act.tau is tau
    assert set(model[1].state_dict()) == {"weight", "bias", "act.tau"}
    assert torch.allclose(model(x), before, atol=1e-5)
    with torch.no_grad():
        tau.add_(1)
        trained = model(x)
        normswap.revert(model)
        assert torch.allclose(model(x), trained, atol=1e-5)


def test_a_filter_response_norm_becomes_another_norm_before_its_threshold() -> None:
    def wanted(x: Tensor, old: Any) -> Tensor:
        return torch.maximum(group_norm(x, old, 4), old.tau.view(1, -1, 1, 1))

    model = around(_filled(layers.FilterResponseNormTlu2d(CHANNELS)))
    keeps_promises(model, "gn", wanted, num_groups=4)
    alone = around(_filled(layers.FilterResponseNormTlu2d(CHANNELS, apply_act=False)))
    keeps_promises(alone, "gn", lambda x, old: group_norm(x, old, 4), num_groups=4)
    acting = around(_filled(layers.FilterResponseNormAct2d(CHANNELS, act_layer=nn.SiLU)))
    keeps_promises(acting, "gn", lambda x, old: F.silu(group_norm(x, old, 4)), num_groups=4)


@pytest.mark.parametrize("form", SIMPLE)
def test_a_simple_norm_becomes_others(form: str) -> None:
    maps = "2d" in form
    made = _filled(getattr(norm, form)(CHANNELS))
    model: Any = around(made) if maps else nn.Sequential(nn.Linear(3, CHANNELS), made).eval()
    x = picture() if maps else torch.randn(2, 5, 3)
    (site,) = normswap.find(model)
    assert site.kind == "simple_norm"
    assert site.channel_dim == (1 if maps else -1)
    with torch.no_grad():
        inner, before = model[0](x), model(x)
        normswap.convert(model, "rms2d" if maps else "rms", where="1")
        square = inner.square().mean(site.channel_dim, keepdim=True)
        gain = made.weight.view(1, -1, 1, 1) if maps else made.weight
        wanted = inner * (square + made.eps).rsqrt() * gain
        assert torch.allclose(model(x), model[2:](wanted), atol=1e-5)
        normswap.revert(model)
        assert torch.equal(model(x), before)
    assert normswap.plan(model, "rms2d" if maps else "rms", where="1")[0].fidelity == "affine"


def test_what_is_a_norm_and_an_activation_in_one_is_not_calibrated() -> None:
    model = around(evonorm("EvoNorm2dS0"))
    normswap.convert(model, "gn", where="1")
    with pytest.raises(StatisticsError, match="in one"):
        normswap.calibrate(model, [picture()])


def threshold() -> Any:
    return around(_filled(layers.FilterResponseNormTlu2d(CHANNELS)))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("1.tau", "1.act.tau"): 2 * value for key, value in state.items()}


@pytest.mark.parametrize("targets", [["frn"], ["gn"], ["gn", "frn", "identity"]])
def test_a_threshold_comes_back_as_it_has_become_whatever_holds_it_now(targets: list[str]) -> None:
    model, meta = threshold(), threshold().to("meta")
    loaded = renamed(model.state_dict())
    for converted in (model, meta):
        for target in targets:
            normswap.convert(converted, target, where="1")
        converted.load_state_dict(loaded, strict=False, assign=True)
        normswap.revert(converted)
        assert torch.equal(converted[1].tau, loaded["1.act.tau"])


def test_a_threshold_follows_where_parameters_are_made_anew() -> None:
    model = threshold()
    normswap.convert(model, "gn", where="1")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with torch.no_grad():
        model[1].act.tau.fill_(2.0)
    normswap.revert(model)
    assert model[1].tau.dtype == torch.float64
    assert bool((model[1].tau == 2.0).all())


def test_a_parametrized_threshold_or_slope_is_left_alone_with_the_reason() -> None:
    for module, name in (
        (layers.FilterResponseNormTlu2d(CHANNELS), "tau"),
        (evonorm("EvoNorm2dS0"), "v"),
    ):
        parametrize.register_parametrization(module, name, nn.Softplus())
        with pytest.raises(normswap.errors.NothingToConvert, match=f"its {name} is parametrized"):
            normswap.plan(around(module), "gn", where="1")


def test_single_positions_are_refused_where_ours_would_refuse_them() -> None:
    model, dot = threshold(), torch.randn(2, 3, 1, 1)
    model(dot)
    with pytest.raises(normswap.errors.NothingToConvert, match="a single value"):
        normswap.convert(model, "frn", where="1", example_inputs=dot)


def test_an_empty_sequential_is_an_activation_too() -> None:
    fused = layers.BatchNormAct2d(CHANNELS, drop_layer=nn.Sequential)
    fused.act = nn.Sequential()
    model = around(fused)
    assert normswap.find(model)[0].activation == "1.act"
    x = picture()
    before = model(x)
    assert torch.allclose(normswap.convert(model, "frozen_bn")(x), before, atol=1e-6)


def test_a_norm_of_maps_tells_that_it_takes_maps() -> None:
    model = around(norm.SimpleNorm2d(CHANNELS))
    assert isinstance(normswap.convert(model, "bn", where="1")[1], nn.BatchNorm2d)
