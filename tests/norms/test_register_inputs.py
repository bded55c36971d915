"""A norm that somebody else wrote and that takes an extra input, with all that ours can do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap import ExtraInput, Form, InputNorm, NormState, Rule, Start
from normswap.errors import InputError, NormSwapError, OptionError
from normswap.norms import registry
from normswap.norms.pool import per_group


class LevelNorm(InputNorm):
    """Layer normalization of a sample's map, whose gain follows each sample's noise level."""

    extra_inputs = (ExtraInput("level", (Form(("N",), "numbers"),)),)
    deltas = ("slope",)

    def __init__(self, num_features: int, *, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.slope = nn.Parameter(torch.zeros(num_features))

    def pools(self, *, tracks: bool) -> Rule:
        return Rule.always(per_group(self.num_features))

    def normalize(self, x: Tensor) -> Tensor:
        _, level = self.called_with("level", x)
        gain = self.weight * (1 + level[:, None] * self.slope)
        return F.group_norm(x, 1, eps=self.eps) * gain[..., None, None] + self.bias[:, None, None]


def read(module: nn.Module) -> NormState:
    return NormState(
        norm="level",
        kind="level",
        num_features=module.num_features,
        rule=module.pools(tracks=False),
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        obstacle=module.obstacle(),
    )


def start(state: NormState, *, carry: str = "auto") -> Start:
    return normswap.begin(
        state,
        lambda: LevelNorm(state.num_features, eps=state.eps),
        Rule.always(per_group(state.num_features)),
        carry=carry,
        affine=True,
        own=LevelNorm.deltas,
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_READERS", dict(registry._READERS))
    normswap.register("level", reads={LevelNorm: read}, inputs=("level",))(start)


def net() -> Any:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def converted() -> Any:
    return normswap.convert(net(), "level", where="kind:group_norm")


X = torch.linspace(-2, 3, 4 * 3 * 5 * 5).sin().view(4, 3, 5, 5)
LEVEL = torch.tensor([0.0, 0.5, 1.0, 2.0])


def test_it_starts_as_the_source() -> None:
    torch.testing.assert_close(converted()(X, level=LEVEL), net()(X), rtol=1e-6, atol=1e-6)


def test_the_model_says_what_it_takes() -> None:
    (told,) = normswap.inputs(converted()).values()
    assert (told.name, told.shape, told.dtype) == ("level", ("N",), torch.float32)


def test_the_output_and_its_gradient_follow_the_input() -> None:
    model = converted().double()
    x, level = X.double(), LEVEL.double().requires_grad_()
    with torch.no_grad():
        model[1].slope.copy_(torch.linspace(-1, 1, 8))
    z = F.group_norm(model[0](x), 1, eps=model[1].eps)
    gain = 1 + level.view(-1, 1, 1, 1) * model[1].slope.view(1, -1, 1, 1)
    expected = model[3](F.relu(z * gain))
    actual = model(x, level=level)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    (want,) = torch.autograd.grad(expected.square().sum(), level)
    (got,) = torch.autograd.grad(actual.square().sum(), level)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "given",
    [{}, {"level": LEVEL[:3]}, {"level": LEVEL.long()}, {"level": LEVEL[:, None]}],
    ids=["missing", "batch", "dtype", "shape"],
)
def test_what_does_not_fit_is_refused_before_a_layer_ran(given: dict[str, Tensor]) -> None:
    model = converted()
    ran = []
    model[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match="level= should be"):
        model(X, **given)
    assert not ran


def test_what_it_has_learned_is_not_lost_in_a_conversion() -> None:
    model = converted()
    with torch.no_grad():
        model[1].slope.fill_(0.1)
    with pytest.raises(NormSwapError, match="follow level="):
        normswap.convert(model, "gn", where="kind:level", strict=True)
    assert type(normswap.revert(model)[1]) is nn.GroupNorm


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_it(again: Any) -> None:
    model = converted()
    torch.testing.assert_close(again(model)(X, level=LEVEL), model(X, level=LEVEL), rtol=0, atol=0)


def test_recipes_know_it() -> None:
    model = normswap.apply_recipe(net(), normswap.recipe(converted()))
    torch.testing.assert_close(model(X, level=LEVEL), converted()(X, level=LEVEL), rtol=0, atol=0)


def test_it_works_alone() -> None:
    layer = normswap.build("gn", 3, num_groups=1)
    norm = normswap.convert(nn.Sequential(layer), "level", where="*")[0]
    torch.testing.assert_close(norm(X, level=LEVEL), layer(X), rtol=1e-6, atol=1e-6)


def test_inputs_without_a_class_that_takes_any() -> None:
    with pytest.raises(OptionError, match="InputNorm"):
        normswap.register("other", reads={nn.Bilinear: read}, inputs=("level",))(start)
    assert "other" not in registry._ENTRIES
