"""Norms of unknown classes: what is recognised, how it is read, and what is none."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.graph.behaviour import Behaviour, behaviour_of
from tests.graph.handmade import (
    NEAR_MISSES,
    NORMS,
    Formatted,
    Frozen,
    HalfCast,
    LastRMS,
    Made,
    Odd,
    OnePlusRMS,
)

SIZE = 12


def trained(module: nn.Module) -> Any:
    """With numbers in all its tensors, variances above 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.double()


def numbers(channel_dim: int) -> Tensor:
    shape = (2, 5, SIZE) if channel_dim == -1 else (2, SIZE, 5, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_is_recognised_and_read(name: str, device: str) -> None:
    make, norm, channel_dim = NORMS[name]
    model = nn.Sequential(nn.Identity(), make()).to(device)
    (site,) = normswap.find(model)
    assert site.path == "1"
    assert site.origin == "module"
    assert site.recognised.startswith("by behaviour")
    assert site.obstacle == ""
    assert (site.state.norm, site.channel_dim, site.num_features) == (norm, channel_dim, SIZE)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_conversion_that_is_called_exact_is(name: str, training: bool) -> None:
    make, norm, channel_dim = NORMS[name]
    model = nn.Sequential(nn.Identity(), trained(make())).train(training)
    x = numbers(channel_dim)
    expected = copy.deepcopy(model)(x)
    # What it is already is left: the same by another name, or with more than it needs, is not.
    to = {"ln": "ln2d", "rms": "rms2d", "ln2d": "ln", "rms2d": "rms"}.get(norm, "gn")
    to = "gn" if norm == "in" or (channel_dim == 1 and norm == "ln") else to
    options = {"num_groups": {"in": SIZE, "ln": 1}.get(norm, 3)} if to == "gn" else {}
    planned = normswap.plan(model, to, where="*", **options)
    if planned[0].action == "already" or str(planned[0].fidelity) != "exact":
        pytest.skip("left, or another function")
    planned.apply()
    assert type(model[1]).__module__.startswith(("torch", "normswap"))
    tolerance = 1e-5 if "single" in name else 1e-11
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("to", ["identity", "ln", "rms", "gn", "bn", "dyt", "sn", "cn"])
def test_keys_stay_and_all_comes_back(name: str, to: str) -> None:
    """All but a gain that is called as a tensor of DyT's own, which is refused."""
    make, _, channel_dim = NORMS[name]
    before = nn.Conv2d(SIZE, SIZE, 1).double() if channel_dim == 1 else nn.Identity()
    model = nn.Sequential(before, trained(make())).eval()
    x, cls = numbers(channel_dim), type(model[1])
    output, state = model(x), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    if to == "dyt" and getattr(model[1], "gain", "") == "alpha":
        with pytest.raises(normswap.errors.NothingToConvert, match="calls a tensor alpha"):
            normswap.convert(model, to, where="*")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normswap.convert(model, to, where="*")
    for key, parameter in model.named_parameters():
        assert parameters.get(key, parameter) is parameter, "a parameter that stays is the same"
    if to not in ("identity",):
        assert parameters.keys() <= dict(model.named_parameters()).keys()
    after = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(copied(x), after, rtol=0, atol=0)
    normswap.revert(model)
    assert type(model[1]) is cls
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(model(x), output)


def test_a_norm_that_takes_maps_only_is_one_of_two_dimensions() -> None:
    for name in ("instances", "batches", "layer norm of whole maps", "torch's, channels first"):
        make, _, _ = NORMS[name]
        (site,) = normswap.find(nn.Sequential(make()))
        assert site.state.dim == 2


@pytest.mark.parametrize("name", NEAR_MISSES)
@pytest.mark.parametrize("offset", ["", "bias"])
def test_what_only_looks_like_a_norm_is_none(name: str, offset: str) -> None:
    model = nn.Sequential(Odd(NEAR_MISSES[name], offset=offset))
    found = normswap.find(model)
    assert len(found) == 0
    assert "Odd" in found.unrecognised["0"]
    assert "not recognised: Odd" in str(found)


@pytest.mark.parametrize(
    "module",
    [nn.Softmax(-1), nn.Linear(12, 12), nn.Dropout(), nn.GELU(), nn.Embedding(12, 12),
     nn.Sequential(LastRMS()), nn.PReLU(12), nn.Conv2d(12, 12, 1), nn.MultiheadAttention(12, 2),
     nn.LocalResponseNorm(3), nn.CosineSimilarity(), nn.Flatten(), nn.AvgPool2d(2)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_torchs_other_modules_are_no_candidates(module: nn.Module) -> None:
    assert not isinstance(behaviour_of(module), Behaviour)


def test_a_gain_of_one_plus_the_weight_is_carried() -> None:
    model = nn.Sequential(OnePlusRMS())
    x = numbers(-1).float()
    with torch.no_grad():
        model[0].weight.uniform_(-0.5, 0.5)
    weight = model[0].weight
    gain = 1 + weight.detach().clone()
    normswap.convert(model, "ln", where="*")
    assert model[0].weight is weight
    torch.testing.assert_close(weight.detach(), gain)
    centred = x - x.mean(-1, keepdim=True)
    expected = gain * centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_norm_of_somebodys_own_is_one(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(SIZE, SIZE, 1).double(), trained(Frozen())).train(training)
    x = numbers(1)
    expected = model(x)
    assert normswap.plan(model, "frozen_bn")[0].action == "already"
    normswap.convert(model, "bn").eval()
    assert isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_a_norm_of_single_precision_only_is_recognised() -> None:
    model = nn.Sequential(trained(HalfCast(SIZE)).float())
    x = numbers(-1).bfloat16()
    expected = model(x)
    (site,) = normswap.find(model)
    assert (site.state.norm, site.state.eps) == ("ln", 1e-5)
    normswap.convert(model, "ln2d", where="*")
    torch.testing.assert_close(model(x.float()).bfloat16(), expected)


class Gated(Made):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.affine(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) * gate


class MaybeGated(Made):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return y if gate is None else y * gate


@pytest.mark.parametrize("cls", [Gated, MaybeGated])
def test_a_norm_of_several_arguments_is_listed_with_the_reason(cls: type[Made]) -> None:
    found = normswap.find(nn.ModuleDict({"norm": cls()}))
    assert [site for site in found if site.origin == "module"] == []
    assert "x, gate" in found.unrecognised["norm"]


def test_what_a_norm_of_several_arguments_writes_out_is_a_site_of_its_own() -> None:
    model: Any = nn.ModuleDict({"norm": MaybeGated()}).double()
    x = numbers(-1)
    expected = model["norm"](x, x.sigmoid())
    (site,) = normswap.find(model)
    assert (site.origin, site.path) == ("handwritten", "norm")
    normswap.convert(model, "rms2d", where="*")
    torch.testing.assert_close(model["norm"](x, x.sigmoid()), expected, rtol=1e-10, atol=1e-10)


def test_trying_out_touches_neither_the_module_nor_the_random_state() -> None:
    make, _, _ = NORMS["batches"]
    model = nn.Sequential(trained(make()).train())
    calls: list[object] = []
    model[0].register_forward_hook(lambda *given: calls.append(given))
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(normswap.find(model)) == 1
    assert not calls
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert model[0].training


def test_settings_tell_modules_of_a_class_from_each_other() -> None:
    model = nn.Sequential(Formatted(), Formatted(first=True), LastRMS(eps=0.1), LastRMS(eps=1e-3))
    found = normswap.find(model)
    assert [site.channel_dim for site in found] == [-1, 1, -1, -1]
    assert [site.state.eps for site in found] == [1e-6, 1e-6, 0.1, 1e-3]


def test_a_recognised_norm_has_its_surroundings() -> None:
    make, _, _ = NORMS["layer norm of maps"]
    model = nn.Sequential(nn.Conv2d(3, SIZE, 1), make(), nn.ReLU(), nn.Conv2d(SIZE, SIZE, 1))
    (site,) = normswap.find(model)
    assert (site.producer, site.activation, site.calls) == ("0", "2", 1)
