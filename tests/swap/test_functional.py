"""Calls of norm functions in a forward are sites: converted in their places, and back."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import normswap
from normswap.errors import NormSwapError, NothingToConvert
from tests.swap.helpers import Snapshot, filled, image, numbers, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

C = 8


class Mixed(nn.Module):
    """Functional norms, dropout and a branch that an attribute decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.gain, self.offset = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.table = nn.Parameter(torch.randn(4, C))
        self.groups, self.fancy, self.rate, self.eps = 2, True, 0.5, 1e-3

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        rows = F.layer_norm(self.table, (C,))  # of weights, not of an activation
        x = self.conv(x)
        y = F.batch_norm(
            x, self.mean, self.var, self.weight, self.bias,
            training=self.training, momentum=0.2, eps=self.eps,
        )  # fmt: skip
        y = F.dropout(F.relu(y), self.rate, self.training)
        if self.fancy:
            return y + F.group_norm(y, self.groups, self.gain, self.offset) * scale
        return y * rows.mean()


def mixed() -> Any:
    return filled(Mixed())


def run(model: Any, *, train: bool = False, fancy: bool = True, **arguments: Any) -> Tensor:
    torch.default_generator.manual_seed(0)
    model.fancy = fancy
    return model.train(train)(image(), **arguments)


def test_they_are_found_under_their_owner_with_their_line() -> None:
    sites = normswap.find(mixed())
    assert [(s.kind, s.origin, s.num_features) for s in sites] == [
        ("batch_norm", "functional", C),
        ("group_norm", "functional", C),
    ]
    assert "F.batch_norm, line" in str(sites)
    line = inspect.getsourcelines(Mixed.forward)[1] + 3
    assert f"line {line}" in sites[0].label


@pytest.mark.parametrize("fancy", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_sync_bn_is_exact_in_both_modes_and_on_both_branches(train: bool, fancy: bool) -> None:
    plain, model = mixed(), normswap.convert(mixed(), "sync_bn")
    torch.testing.assert_close(
        run(model, train=train, fancy=fancy), run(plain, train=train, fancy=fancy)
    )
    assert same_bits(model.mean, plain.mean)
    assert same_bits(model.var, plain.var)
    assert (model.mean != mixed().mean).any() or not train


def test_frozen_bn_moves_no_buffer() -> None:
    model = normswap.convert(mixed(), "frozen_bn")
    before = model.mean.clone()
    run(model, train=True)
    assert same_bits(model.mean, before)
    assert not model.weight.requires_grad


def test_tensors_stay_the_owners_under_their_keys() -> None:
    plain, model = mixed(), mixed()
    weight = model.weight
    normswap.convert(model, "sync_bn")
    assert model.weight is weight
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        "functional_batch_norm_1.num_batches_tracked"
    }
    assert len(list(model.parameters())) == len(list(plain.parameters()))


def test_the_signature_and_the_class_stay() -> None:
    model = normswap.convert(mixed(), "sync_bn")
    assert inspect.signature(model.forward) == inspect.signature(mixed().forward)
    assert isinstance(model, Mixed)
    assert type(model).__name__ == "Mixed"
    assert not same_bits(run(model, scale=2.0), run(model, scale=1.0))


def test_moment_matched_and_reverted() -> None:
    model = mixed()
    before, evaluated = Snapshot(model), run(model)
    normswap.convert(model, "gn", num_groups=1, where="kind:batch_norm")
    assert normswap.report(model)[0].fidelity == "matched"
    assert not same_bits(run(model), evaluated)
    model.train()
    before.assert_kept(normswap.revert(model))
    assert type(model) is Mixed


def test_the_same_call_twice_equals_once() -> None:
    model = normswap.convert(mixed(), "gn", where="*")
    once = Snapshot(model)
    normswap.convert(model, "gn", where="*")
    once.assert_kept(model, untouched=True)


def test_a_chain_goes_back_to_the_call() -> None:
    model = mixed()
    before = Snapshot(model)
    normswap.convert(normswap.convert(model, "sync_bn"), "gn", where="kind:batch_norm")
    assert "functional_batch_norm_1.weight" not in model.state_dict()
    before.assert_kept(normswap.revert(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_tensors_of_their_own_and_go_back(way: str) -> None:
    model = normswap.convert(mixed(), "sync_bn")
    clone: Any = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert same_bits(run(clone), run(model))
    with torch.no_grad():
        clone.weight.zero_()
    assert not same_bits(run(clone), run(model))
    assert type(normswap.revert(clone)) is Mixed
    assert type(model) is not Mixed


def test_a_move_to_another_precision_takes_the_norm_along() -> None:
    model = normswap.convert(mixed(), "sync_bn").double()
    plain = mixed().double()
    x = image().double()
    assert same_bits(model.eval()(x), plain.eval()(x))
    model.train()(x), plain.train()(x)
    assert model.mean.dtype == torch.float64


def test_it_trains() -> None:
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normswap.convert(model, "gn", where="*")
    before = model.weight.detach().clone()
    run(model, train=True).square().sum().backward()
    optimizer.step()
    assert (model.weight != before).any()


def test_an_error_in_the_middle_leaves_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    before = Snapshot(model)

    def failing(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(KeyboardInterrupt):
            normswap.convert(model, "gn", num_groups=1, where="*")
    before.assert_kept(model)
    assert type(model) is Mixed


def test_inside_a_block_only() -> None:
    model = mixed()
    before = Snapshot(model)
    with normswap.converted(model, "sync_bn"):
        assert type(model) is not Mixed
    before.assert_kept(model)


def test_one_compiled_graph() -> None:
    torch._dynamo.reset()
    model = normswap.convert(mixed(), "sync_bn").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), model(image()))


# -- forms of calls and forwards ----------------------------------------------------------------


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.__eps = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.w, self.b, self.__eps)


class Tracked(Base):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros(C))
        self.register_buffer("v", torch.ones(C))


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(super().forward(x) * 2, [C], self.w, None, 1e-5)


class Closed(Base):
    pass


def closed() -> type[nn.Module]:
    shift = 3.0

    class Inner(Base):
        def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return F.rms_norm(x + shift, (C,), self.w) * factor

    return Inner


class Instance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.instance_norm(x, self.w, self.b, None, None, True, 0.1, 1e-4, False)


class Grouped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, 4, self.w, self.b, 1e-4)


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.w, bias=self.b)


class Root(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, [C], self.w, 1e-4)


class Batch(Tracked):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, self.w, self.b, self.m, self.v, self.training, 0.1, 1e-4, False)


TOKENS = (2, 5, C)
FORMS = {
    "an imported name, a private attribute": (Base, TOKENS, "rms"),
    "torch's twin, super()": (Derived, TOKENS, "rms"),
    "a parent's forward": (Closed, TOKENS, "rms"),
    "a closure, a default": (closed(), TOKENS, "ln"),
    "torch's instance norm": (Instance, (2, C, 5, 4), "gn"),
    "instance norm by keywords": (Plain, (2, C, 5, 4), "ln"),
    "torch's group norm, to one that asks for dimensions": (Grouped, (2, C, 5, 4), "in"),
    "torch's RMS norm": (Root, TOKENS, "ln"),
    "torch's batch norm, to one that asks for dimensions": (Batch, (4, C, 5, 4), "in"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_call_goes_there_and_back(name: str) -> None:
    make, shape, target = FORMS[name]
    model: Any = filled(make()).eval()
    x = numbers(*shape)
    before, plain = Snapshot(model), model(x)
    normswap.convert(model, target, where="*")
    assert type(model) is not make
    assert not same_bits(model(x), plain)
    before.assert_kept(normswap.revert(model))
    assert same_bits(model(x), plain)


@pytest.mark.parametrize("name", FORMS)
def test_converting_to_what_it_is_changes_nothing(name: str) -> None:
    make, _, _ = FORMS[name]
    model: Any = filled(make())
    (site,) = normswap.find(model)
    normswap.convert(model, site.kind, where="*")
    assert type(model) is make


def test_weight_standardization_is_no_site() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True
            ).reshape_as(self.weight)
            return F.conv2d(x, weight)

    assert len(normswap.find(Standardized(3, C, 1))) == 0


def test_what_the_forward_computes_is_listed_with_the_reason() -> None:
    class Computed(Base):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(x, (C,), self.w * scale)

    model = Computed()
    (site,) = normswap.find(model)
    assert "weight" in site.obstacle
    with pytest.raises(NothingToConvert, match="weight is computed in the forward"):
        normswap.convert(model, "rms", where="*")


def test_a_forward_without_source_is_left_alone() -> None:
    names: dict[str, Any] = {"nn": nn, "F": F}
    exec("class M(nn.Module):\n def forward(self, x):\n  return F.layer_norm(x, (8,))", names)
    with pytest.raises(NormSwapError):
        normswap.convert(names["M"](), "rms", where="*")


def test_timms_weight_standardization_is_no_site() -> None:
    timm = pytest.importorskip("timm")
    assert len(normswap.find(timm.create_model("dm_nfnet_f0", pretrained=False))) == 0


# -- statistics ---------------------------------------------------------------------------------


def test_preserve_stats_keeps_those_that_a_call_updates() -> None:
    model = mixed()
    before = model.mean.clone()
    with normswap.preserve_stats(model):
        run(model, train=True)
        assert not same_bits(model.mean, before)
    assert same_bits(model.mean, before)


def test_a_call_is_not_measured_by_a_warm_up_and_the_report_says_so() -> None:
    model = nn.Sequential(mixed(), nn.BatchNorm2d(C))
    report = normswap.warmup(model, [image()])
    assert [row.path for row in report.estimated] == ["1"]
    assert "convert it" in report.left[0].status


def test_once_converted_it_is_measured() -> None:
    model = normswap.convert(mixed(), "sync_bn")
    seen = model.conv(image()).detach()
    normswap.warmup(model, [image()])
    torch.testing.assert_close(model.mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(model.var, seen.var((0, 2, 3)))


# -- what happens in between --------------------------------------------------------------------


def test_a_state_loaded_by_assignment_is_what_a_second_conversion_reads() -> None:
    model, other = normswap.convert(mixed(), "sync_bn"), filled(Mixed(), seed=5)
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    (site,) = [site for site in normswap.find(model) if site.kind == "batch_norm"]
    assert site.state.running_mean is model.mean
    assert site.state.weight is model.weight


def test_a_frozen_call_loaded_by_assignment_is_thawed() -> None:
    model = normswap.convert(mixed(), "frozen_bn")
    model.load_state_dict(filled(Mixed(), seed=5).state_dict(), strict=False, assign=True)
    assert normswap.revert(model).weight.requires_grad


def test_a_warm_up_after_a_move_and_before_any_forward() -> None:
    model = normswap.convert(mixed(), "sync_bn").double()
    x = image().double()
    normswap.warmup(model, [x])
    torch.testing.assert_close(model.mean, model.conv(x).detach().mean((0, 2, 3)))


def test_preserve_stats_of_a_converted_call() -> None:
    model = normswap.convert(mixed(), "sync_bn")
    before = model.mean.clone()
    with normswap.preserve_stats(model):
        run(model, train=True)
    assert same_bits(model.mean, before)


def test_tracing_leaves_no_proxy_behind() -> None:
    model = nn.Sequential(normswap.convert(mixed(), "sync_bn"))
    torch.fx.symbolic_trace(model)
    (norm,) = [norm for path, norm in model.named_modules() if "functional" in path]
    assert norm.weight is model[0].weight


def test_unpacked_arguments_are_refused() -> None:
    class Unpacked(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (C,), **{"eps": 0.5})

    with pytest.raises(NothingToConvert, match="unpacked"):
        normswap.convert(Unpacked(), "rms", where="*")


class Twice(Tracked):
    """Two calls with one affine."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.m, self.v, self.w, self.b)
        return F.batch_norm(x + 1, self.m, self.v, self.w, self.b)


def test_an_affine_of_two_calls_is_not_rewritten_for_one() -> None:
    model: Any = filled(Twice())
    weight = model.w.detach().clone()
    plan = normswap.plan(model, "gn", num_groups=1, where="functional_batch_norm_0")
    assert [str(step.fidelity) for step in plan.of("convert")] == ["affine"]
    plan.apply()
    assert same_bits(model.w, weight)


class Holder(nn.Module):
    """Hands the tensors of a child to a norm function."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, bn.weight, bn.bias, self.training
        )


def test_a_norm_that_only_holds_tensors_is_refused() -> None:
    model = Holder()
    before = Snapshot(model)
    with pytest.raises(NothingToConvert, match="hands its tensors to a norm function"):
        normswap.convert(model, "gn", where="*")
    before.assert_kept(model, untouched=True)


def assigned() -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.w, self.b)

    class Assigned(Base):
        pass

    Assigned.forward = forward  # type: ignore[method-assign]
    return Assigned


class Quoted(Base):
    def forward(self, /, x: Tensor) -> Tensor:
        self.said = """a
            b"""
        return F.layer_norm(x, (C,), self.w, self.b)


@pytest.mark.parametrize("make", [assigned(), Quoted], ids=["assigned", "quoted"])
def test_a_forward_of_another_shape(make: Any) -> None:
    model, plain = normswap.convert(filled(make()), "ln2d", where="*"), filled(make())
    x = numbers(*TOKENS)
    torch.testing.assert_close(model(x), plain(x))
    assert type(model) is not make
    assert getattr(model, "said", None) == getattr(plain, "said", None)


def test_a_class_given_after_the_conversion_is_left_as_it_is() -> None:
    from torch.nn.utils import parametrize

    model = normswap.convert(mixed(), "sync_bn")
    parametrize.register_parametrization(model, "gain", nn.Softplus())
    evaluated = run(model)
    normswap.revert(model)
    torch.testing.assert_close(run(model), evaluated)


def test_a_norm_that_asks_for_dimensions_is_right_in_any_number_of_them() -> None:
    for shape in ((2, C, 5), (2, C, 5, 4), (2, C, 3, 5, 4)):
        model = normswap.convert(filled(Grouped()), "in", where="*")
        x = numbers(*shape)
        wanted = F.instance_norm(x, weight=model.w, bias=model.b, eps=1e-4)
        torch.testing.assert_close(model(x), wanted)


def test_the_default_eps_of_a_call_in_half_precision_is_torchs() -> None:
    class Half(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (C,), self.w)

    model = filled(Half()).bfloat16()
    x = (numbers(4, C) * 1e-2).bfloat16()
    before = model(x)
    normswap.convert(model, "rms2d", where="*")
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
