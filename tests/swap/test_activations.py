"""Norms that take the activation behind them along: which one, in whatever form it is called."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.errors import CannotRevert
from normswap.norms.standardization.filter_response import TLU
from tests.reference.beyond import along
from tests.reference.data import close, values
from tests.swap.helpers import filled

C = 4


class Net(nn.Module):
    """Two convolutions with a norm each, and what else a forward calls."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)
        for name, child in children.items():
            self.add_module(name, child)


class ByModule(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


class ByOneModule(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))


class ByFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return torch.relu(self.bn2(self.conv2(x)))


class ByMethod(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())).relu()


class InSequence(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def by_module() -> nn.Module:
    return ByModule(act1=nn.ReLU(inplace=True), act2=nn.ReLU())


def by_one_module() -> nn.Module:
    return ByOneModule(act=nn.ReLU(inplace=True))


def by_function() -> nn.Module:
    return ByFunction()


def by_method() -> nn.Module:
    return ByMethod()


def in_sequence() -> nn.Module:
    net = InSequence()
    net.first = nn.Sequential(net.conv1, net.bn1, nn.ReLU())
    net.rest = nn.Sequential(net.conv2, nn.Identity(), net.bn2, nn.Identity(), nn.ReLU())
    for name in ("conv1", "bn1", "conv2", "bn2"):
        delattr(net, name)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "modules": by_module,
    "one module for both": by_one_module,
    "functions": by_function,
    "methods": by_method,
    "sequences": in_sequence,
}
each_net = pytest.mark.parametrize("make", NETS.values(), ids=list(NETS))
each_norm = pytest.mark.parametrize("norm", ["frn", "evonorm_b0", "evonorm_s0"])
EVONORMS = pytest.mark.parametrize("norm", ["evonorm_b0", "evonorm_s0"])


def model_of(make: Callable[[], nn.Module]) -> Any:
    model: Any = filled(make()).double().eval()
    return model


def x_of(seed: int = 0) -> Tensor:
    return values(3, 3, 8, 7, seed=seed)


def by_formula(model: nn.Module, x: Tensor) -> Tensor:
    """Convolution, filter response and threshold, twice."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if type(m).__name__ == "FilterResponseNorm"]
    units = [m for m in model.modules() if isinstance(m, TLU)]
    for conv, norm, unit in zip(convs, norms, units, strict=True):
        y = conv(x)
        y = y / ((y * y).sum((2, 3), keepdim=True) / y[0, 0].numel() + norm.eps) ** 0.5
        y = y * along(norm.weight, y) + along(norm.bias, y)
        least = along(unit.tau, y)
        x = torch.where(y > least, y, least.expand_as(y))
    return x


@each_net
def test_every_relu_becomes_a_threshold_of_its_own(make: Callable[[], nn.Module]) -> None:
    model = normswap.convert(model_of(make), "frn")
    units = [m for m in model.modules() if isinstance(m, TLU)]
    assert len(units) == 2
    assert all(not unit.tau.any() for unit in units)
    with torch.no_grad():
        for index, unit in enumerate(units):
            unit.tau.copy_(values(C, seed=index))
    close(model(x_of()), by_formula(model, x_of()))


@each_net
def test_at_the_start_a_threshold_is_the_relu(make: Callable[[], nn.Module]) -> None:
    one = normswap.convert(model_of(make), "frn")
    other = normswap.convert(model_of(make), "frn", activation="keep")
    assert not any(isinstance(m, TLU) for m in other.modules())
    close(one(x_of()), other(x_of()))


@each_net
@each_norm
def test_all_of_it_is_taken_back(norm: str, make: Callable[[], nn.Module]) -> None:
    model, like = model_of(make), model_of(make)
    before = {path: (id(m), type(m)) for path, m in model.named_modules()}
    expected = model(x_of())
    normswap.convert(model, norm)
    assert not torch.allclose(model(x_of()), expected)
    normswap.revert(model)
    assert {path: (id(m), type(m)) for path, m in model.named_modules()} == before
    assert list(model.state_dict()) == list(like.state_dict())
    assert torch.equal(model(x_of()), expected)


@each_net
@each_norm
def test_copies_pickles_and_files(norm: str, make: Callable[[], nn.Module], tmp_path: Any) -> None:
    if make is in_sequence:
        made = model_of(make)
    model = normswap.convert(model_of(make), norm)
    expected = model(x_of())
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(model_of(make), tmp_path / "model.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        close(other(x_of()), expected)
        back = normswap.revert(other)
        assert not any(isinstance(m, TLU) for m in back.modules())
        if make is in_sequence:
            assert list(back.state_dict()) == list(made.state_dict())


@each_net
@each_norm
def test_it_trains_and_compiles(norm: str, make: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    model = normswap.convert(model_of(make), norm).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    y = model(x_of())
    close(compiled(x_of()), y)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@each_norm
def test_the_same_call_twice_changes_nothing_more(norm: str) -> None:
    model = normswap.convert(model_of(by_one_module), norm)
    before = dict(model.named_modules())
    normswap.convert(model, norm)
    assert dict(model.named_modules()) == before


class Other(Net):
    """Norms whose outputs are read twice, by no activation, by another one, and by a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(self.act(y)))
        return self.silu(self.bn3(self.conv3(z + 1))) + self.act(self.bn4(self.conv4(y))).mean()


def other() -> nn.Module:
    net = Other(act=nn.ReLU(), silu=nn.SiLU())
    net.conv3, net.bn3 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
    net.conv4, net.bn4 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
    return net


def test_what_has_no_relu_of_its_own_keeps_what_it_has_and_says_so() -> None:
    notes = {step.site.path: step.note for step in normswap.plan(model_of(other), "frn")}
    assert "without TLU: no single activation alone reads it" in notes["bn1"]
    assert "without TLU: add reads it" in notes["bn2"]
    assert "without TLU: silu is no ReLU" in notes["bn3"]
    assert "becomes a TLU" in notes["bn4"]
    model = normswap.convert(model_of(other), "frn")
    assert sum(isinstance(m, TLU) for m in model.modules()) == 1
    assert isinstance(model.act, nn.ReLU)
    assert isinstance(model.silu, nn.SiLU)


def test_an_evonorm_stands_for_any_plain_activation() -> None:
    notes = {step.site.path: step.note for step in normswap.plan(model_of(other), "evonorm_b0")}
    assert "gain and offset alone" in notes["bn1"]
    assert "gain and offset alone" in notes["bn2"]
    assert "stands for silu too" in notes["bn3"]
    assert "stands for act_call_1 too" in notes["bn4"]


def test_a_relu_that_follows_something_else_too_stays() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            for norm in (self.bn1, self.bn2):
                x = self.act(norm(self.conv1(x) if norm is self.bn1 else x))
            return x

    notes = [step.note for step in normswap.plan(model_of(lambda: Twice(act=nn.ReLU())), "frn")]
    assert all("follows something else too" in note for note in notes)


def test_a_hook_on_the_relu_is_left_alone() -> None:
    model = model_of(by_module)
    seen = []
    model.act1.register_forward_hook(lambda module, args, y: seen.append(y))
    (first, second) = normswap.plan(model, "frn")
    assert "a hook is on the activation" in first.note
    assert "act2 becomes a TLU" in second.note
    normswap.convert(model, "frn")(x_of())
    assert len(seen) == 1


def test_a_model_that_cannot_be_traced_keeps_its_activations() -> None:
    class Untraceable(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x + 1
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    model = model_of(lambda: Untraceable())
    assert all("no graph shows" in step.note for step in normswap.plan(model, "frn"))
    normswap.convert(model, "frn")(x_of())


def test_a_norm_and_its_relu_called_several_times_share_a_threshold() -> None:
    class Loop(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            for _ in range(3):
                x = self.act(self.bn1(x))
            return x

    model = normswap.convert(model_of(lambda: Loop(act=nn.ReLU())), "frn", where="bn1")
    assert isinstance(model.act, TLU)


# -- EvoNorm ----------------------------------------------------------------------------------


@EVONORMS
def test_without_an_activation_behind_it_evaluates_as_before(norm: str) -> None:
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)))
    expected = model(x_of())
    (step,) = normswap.plan(model, norm)
    assert step.fidelity == "eval"
    torch.testing.assert_close(normswap.convert(model, norm)(x_of()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1)])
@EVONORMS
def test_the_start_is_the_nearest_for_gaussian_values(norm: str, act: nn.Module) -> None:
    """On such values neither gain, nor offset, nor another slope that was tried does better."""
    model: Any = model_of(lambda: nn.Sequential(nn.BatchNorm2d(C), act))
    # Quantiles: values whose mean and variance are the distribution's, in every sample.
    places = torch.special.ndtri((torch.arange(5000, dtype=torch.double) + 0.5) / 5000)
    noise = places.view(1, 1, -1, 1).expand(2, C, -1, 1)
    x = along(model[0].running_mean, noise) + along(model[0].running_var.sqrt(), noise) * noise
    expected = model(x)
    converted = normswap.convert(model, norm)
    new = converted[0]
    start = (converted(x) - expected).square().mean((0, 2, 3))

    def error() -> Tensor:
        return (converted(x) - expected).square().mean((0, 2, 3))

    for name, steps in (("weight", (0.97, 1.03)), ("v", (0.5, 2.0, -1.0))):
        kept = getattr(new, name).detach().clone()
        for factor in steps:
            with torch.no_grad():
                getattr(new, name).copy_(kept * factor)
            if name == "v":
                refit(new, x, expected)
            assert (error() >= start * 0.98).all(), (name, factor)
        with torch.no_grad():
            getattr(new, name).copy_(kept)


def refit(norm: Any, x: Tensor, expected: Tensor) -> None:
    """Gain and offset by least squares, for a slope that was set."""
    with torch.no_grad():
        norm.weight.fill_(1), norm.bias.fill_(0)
        z, dims = norm(x), (0, 2, 3)
        mean, aim = z.mean(dims), expected.mean(dims)
        common = ((z - along(mean, z)) * (expected - along(aim, z))).mean(dims)
        norm.weight.copy_(common / z.var(dims, correction=0))
        norm.bias.copy_(aim - norm.weight * mean)


@pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")
@EVONORMS
def test_another_norm_in_its_place_gets_the_activation_back(norm: str) -> None:
    model = model_of(by_one_module)
    plain = normswap.convert(model_of(by_one_module), "identity", where="*")
    normswap.convert(model, norm)
    normswap.convert(model, "identity", where="*")
    close(model(x_of()), plain(x_of()))


@EVONORMS
def test_calibration_aims_at_what_the_activation_makes_of_it(norm: str) -> None:
    model: Any = model_of(lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    x = values(200, C, 6, 6)
    expected = model(x)
    converted: Any = normswap.convert(model, norm)
    report = normswap.calibrate(converted, x.split(10), refine_passes=0, progress=False)
    assert report.output_after < report.output_before
    reached = (converted(x) - expected).square().mean()
    refit(converted[0], x, expected)
    least = (converted(x) - expected).square().mean()
    assert abs(reached / least - 1) < 0.01


# -- the threshold alone ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, C), (3, C, 5), (3, C, 2, 4), (3, C, 2, 2, 2)])
def test_a_threshold_by_itself(shape: tuple[int, ...]) -> None:
    unit = normswap.TLU(C).double()
    x = values(*shape)
    close(unit(x), x.clamp(min=0))
    with torch.no_grad():
        unit.tau.copy_(values(C, seed=3))
    expected = torch.stack([x[:, c].clamp(min=unit.tau[c].item()) for c in range(C)], 1)
    close(unit(x), expected)
    tokens = normswap.TLU(C, channel_dim=-1).double()
    tokens.load_state_dict(unit.state_dict())
    close(tokens(x.movedim(1, -1)).movedim(-1, 1), expected)


def test_a_threshold_with_a_slope() -> None:
    unit = normswap.TLU(C, affine=True).double()
    with torch.no_grad():
        unit.tau.copy_(values(C, seed=3))
        unit.alpha.copy_(values(C, seed=4))
    x = values(3, C, 2, 4).requires_grad_()
    line = along(unit.alpha, x) * x + along(unit.tau, x)
    close(unit(x), torch.where(x > line, x, line))
    assert torch.autograd.gradcheck(unit, x)


def test_a_built_norm_ends_in_a_threshold_where_it_is_asked_for() -> None:
    plain = normswap.build("frn", C)
    unit = normswap.build("frn", C, activation="tlu")
    x = values(3, C, 4, 4).float()
    assert torch.equal(unit(x), plain(x).clamp(min=0))
    assert "act.tau" in unit.state_dict()


# -- what looks like a case for it, and is none -----------------------------------------------


def notes_of(model: nn.Module, norm: str = "frn") -> list[str]:
    return [step.note for step in normswap.plan(model, norm)]


class LeavingEarly(Net):
    """An auxiliary head, in training only, that shares the ReLU."""

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn1(self.conv1(x)))
        return (self.bn2(self.conv2(y)), self.act(-y)) if self.training else self.conv2(y)


@pytest.mark.parametrize("training", [True, False])
@each_norm
def test_what_else_a_relu_does_in_the_other_mode_it_still_does(norm: str, training: bool) -> None:
    model = model_of(lambda: LeavingEarly(act=nn.ReLU())).train(training)
    normswap.convert(model, norm, where="bn1")
    assert isinstance(model.act, nn.ReLU)
    _, head = model.train()(x_of())
    assert (head >= 0).all()


class ByMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        if self.training:
            return F.relu(y)
        return torch.relu(y)


@each_norm
def test_one_activation_in_each_mode_is_left_alone(norm: str) -> None:
    assert "no single activation alone reads it" in notes_of(model_of(ByMode), norm)[0]


relu = F.relu


class Shadowed(Net):
    def forward(self, x: Tensor) -> Tensor:
        relu = F.gelu
        return relu(self.bn1(self.conv1(x)))


def test_a_local_name_is_not_taken_for_what_it_hides() -> None:
    model = model_of(Shadowed)
    expected = normswap.convert(model_of(Shadowed), "frn", activation="keep", where="bn1")(x_of())
    close(normswap.convert(model, "frn", where="bn1")(x_of()), expected)


class Nested(Net):
    """A function inside, whose first argument is called as the module is."""

    def forward(self, x: Tensor) -> Tensor:
        def act(self: Any, y: Tensor) -> Tensor:
            return torch.relu(y) + self

        return F.relu(self.bn1(self.conv1(act(0, x))))


def test_a_function_inside_that_names_another_self_is_left_alone() -> None:
    model = normswap.convert(model_of(Nested), "frn", where="bn1")
    assert sum(isinstance(m, TLU) for m in model.modules()) == 1
    model(x_of())


@pytest.mark.parametrize(
    "act", [nn.Hardtanh(0, 20), nn.Hardtanh(0, 1e5), nn.ReLU6(), nn.Threshold(0.1, 0)], ids=repr
)
def test_a_relu_with_a_cap_or_a_step_is_none(act: nn.Module) -> None:
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), act))
    assert "without TLU" in notes_of(model)[0]


@pytest.mark.parametrize("act", [nn.Softmax(0), nn.Softmax2d(), nn.LogSoftmax(-3), nn.PReLU()])
@EVONORMS
def test_what_learns_or_looks_at_other_values_stays(norm: str, act: nn.Module) -> None:
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), act))
    expected = model(x_of())
    assert "gain and offset alone" in notes_of(model, norm)[0]
    close(normswap.convert(model, norm)(x_of()), expected)


def test_a_hook_on_the_norm_still_sees_what_comes_before_the_activation() -> None:
    model = model_of(by_module)
    model.bn1.register_forward_hook(lambda module, args, y: y + 3)
    assert "a hook stands between" in notes_of(model, "evonorm_s0")[0]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize("act", [nn.ReLU(), None], ids=["module", "function"])
@each_norm
def test_a_part_without_its_activation_is_not_reverted(norm: str, act: Any) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Inner()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return F.relu(y) if self.act is None else self.act(y)

    model = model_of(Outer)
    expected = model(x_of())
    changed = normswap.convert(model, norm)(x_of())
    with pytest.raises(CannotRevert, match="outside of the part"):
        normswap.revert(model.block)
    close(model(x_of()), changed)
    close(normswap.revert(model)(x_of()), expected)


def test_the_input_may_be_given_by_its_name() -> None:
    class ByKeyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(input=self.bn1(self.conv1(x)), inplace=True)

    model = normswap.convert(model_of(ByKeyword), "frn", where="bn1")
    assert isinstance(model.functional_relu_0, TLU)
    assert (model(x_of()) >= 0).all()
