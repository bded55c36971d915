"""Norms written out in a forward: which are recognised, and what a conversion makes of them."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.graph.written_out import HEAD, NEAR_MISSES, SIZE, Written, made, near_miss, written

SEEDS = range(200)


def trained(given: Written, seed: int) -> Any:
    torch.default_generator.manual_seed(seed)
    return given.make().double().eval()


def numbers(channel_dim: int) -> Tensor:
    shape = (2, 5, SIZE) if channel_dim == -1 else (2, SIZE, 5, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_norm_that_is_written_out_is_recognised(seed: int) -> None:
    given = written(seed)
    (site,) = normswap.find(given.make())
    assert site.origin == "handwritten"
    assert (site.state.norm, site.channel_dim) == (given.norm, given.channel_dim)
    assert site.num_features == SIZE
    assert site.recognised.startswith("by behaviour")


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_one_becomes_a_norm_and_comes_back(seed: int) -> None:
    given = written(seed)
    model, x = trained(given, seed), numbers(given.channel_dim)
    before, state, cls = model(x), copy.deepcopy(model.state_dict()), type(model)
    # The same norm by another name: the outputs are the module's own.
    same = {"ln": "ln2d", "rms": "rms2d", "ln2d": "ln", "rms2d": "rms"}.get(given.norm)
    for to in ("identity", "gn", same):
        if to is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planned = normswap.plan(model, to, where="*")
            planned.apply()
        (step,) = planned
        if step.action == "already":
            continue
        after = model(x)
        if str(step.fidelity) == "exact":
            slack = 1e-5 if "float" in given.source else 1e-11
            torch.testing.assert_close(after, before, rtol=slack, atol=slack)
        else:
            assert not torch.allclose(after, before)
        assert model.state_dict().keys() >= state.keys()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(x), after, rtol=0, atol=0)
        normswap.revert(model)
        assert type(model) is cls
        assert torch.equal(model(x), before)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("body", NEAR_MISSES)
@pytest.mark.parametrize("before", ["", "x = self.layer(x)\n", "x = F.relu(self.layer(x)) + x\n"])
def test_what_is_near_a_norm_is_none(body: str, before: str) -> None:
    assert len(normswap.find(made(near_miss(before + body)))) == 0


SEVERAL = (
    HEAD
    + '''
def rms(x, gain, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.first = nn.Parameter(torch.rand(12) + 0.5)
        self.second = nn.Parameter(torch.rand(1, 1, 12))
        self.third = nn.Parameter(torch.rand(12) + 0.5)
        self.shift = nn.Parameter(torch.rand(12))

    def _standardized(self, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)

    def forward(self, x, *, twice=False):
        """Three norms: by a function, by a method, and written out."""
        kept = x
        y = self.layer(rms(x, self.first))
        if twice:
            y = 2 * y
        y = self._standardized(y) * (1 + self.second)
        for _ in range(2):
            y = self.layer(y)
        mean = y.mean(-1, keepdim=True)
        var = (y - mean).pow(2).mean(-1, keepdim=True)
        y = (y - mean) / (var + 1e-6).sqrt() * self.third + self.shift
        return kept + y
'''
)


def test_several_in_one_forward_by_a_function_by_a_method_and_written_out() -> None:
    torch.default_generator.manual_seed(0)
    model, x = made(SEVERAL).double(), numbers(-1)
    before = model(x), model(x, twice=True)
    found = normswap.find(model)
    assert sorted(site.kind for site in found) == ["layer_norm", "rms_norm", "rms_norm"]
    names = {site.aliases[-1] for site in found}
    assert len(names) == 3
    for to, kind in (("rms2d", "rms_norm"), ("ln2d", "layer_norm")):
        normswap.convert(model, to, where=f"kind:{kind}")
        torch.testing.assert_close(model(x), before[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model(x, twice=True), before[1], rtol=1e-11, atol=1e-11)
    assert {name for name, _ in model.named_children()} == {"layer", *names}
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    normswap.revert(model)
    assert torch.equal(model(x), before[0])
    assert [name for name, _ in model.named_children()] == ["layer"]


def test_one_of_several_goes_back_by_itself() -> None:
    torch.default_generator.manual_seed(0)
    model, x = made(SEVERAL).double(), numbers(-1)
    names = [site.aliases[-1] for site in normswap.find(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normswap.convert(model, "identity", where=names[0])
        one = model(x)
        with normswap.converted(model, "identity", where=names[1]):
            assert not torch.allclose(model(x), one)
    assert torch.equal(model(x), one)


def test_gradients_reach_the_owners_parameters_in_their_shape() -> None:
    torch.default_generator.manual_seed(0)
    model, x = made(SEVERAL).double(), numbers(-1)
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    normswap.convert(model, "rms2d", where="kind:rms_norm", carry="auto")
    model(x).sum().backward()
    for name in ("first", "layer.weight", "third"):
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name])
    assert model.second.grad.shape == (1, 1, 12)
    torch.testing.assert_close(model.second.grad, expected["second"])


def test_weights_that_follow_a_move_are_used() -> None:
    torch.default_generator.manual_seed(0)
    model, x = made(SEVERAL), numbers(-1).float()
    normswap.convert(model, "rms2d", where="kind:rms_norm")
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    torch.testing.assert_close(moved(x), model(x))


def test_a_weight_that_is_read_elsewhere_too_is_not_rewritten() -> None:
    source = SEVERAL.replace("return kept + y", "return kept + y + self.second")
    torch.default_generator.manual_seed(0)
    model = made(source).double()
    second = model.second.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normswap.convert(model, "rms2d", where="kind:rms_norm")
    assert torch.equal(model.second, second)


def test_a_forward_whose_source_cannot_be_read_is_searched_no_further() -> None:
    scope: dict[str, Any] = {}
    exec(SEVERAL, scope)
    assert len(normswap.find(scope["Module"]())) == 0


def test_a_model_of_blocks_tells_each_blocks_norms() -> None:
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(made(SEVERAL), nn.ReLU(), made(SEVERAL))
    paths = [site.path for site in normswap.find(model)]
    assert paths == ["0"] * 3 + ["2"] * 3
