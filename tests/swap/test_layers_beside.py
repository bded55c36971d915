"""Norms that change what the layer before them computes, or follow its weight: by the formulas."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.errors import CannotRevert, NormSwapError, NothingToConvert
from tests.reference import layers
from tests.reference.beyond import along
from tests.reference.data import close, fill, values
from tests.reference.layers import CrossIteration, Geometry

IN, OUT = 4, 6
GEOMETRIES = {
    "plain": Geometry(),
    "strided": Geometry((3, 3), (2, 1), (1, 2)),
    "dilated in groups": Geometry((2, 3), (1, 2), (1, 1), (2, 1), groups=2),
    "pointwise": Geometry((1, 1)),
}
LAYERS = ["cosine", "pearson", "ws_gn", "cbn"]

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))


def net(geometry: Geometry = GEOMETRIES["plain"], *, bias: bool = True) -> nn.Sequential:
    """A convolution and its BatchNorm, in double precision, with numbers that all differ."""
    conv = nn.Conv2d(
        IN, OUT, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation,
        geometry.groups, bias=bias,
    )  # fmt: skip
    model: Any = fill(nn.Sequential(conv, nn.BatchNorm2d(OUT)))
    model[1].running_mean.copy_(values(OUT, seed=7))
    model[1].running_var.copy_(values(OUT, seed=8).abs() + 0.3)
    return model


def affine(y: Tensor, model: Any) -> Tensor:
    return along(model[1].weight, y) * y + along(model[1].bias, y)


RULES: dict[str, Callable[[Tensor, Any, Geometry], Tensor]] = {
    "cosine": lambda x, m, g: affine(layers.outputs(x, m[0].weight, g, layers.cosine), m),
    "pearson": lambda x, m, g: affine(layers.outputs(x, m[0].weight, g, layers.pearson), m),
    "ws_gn": lambda x, m, g: affine(
        layers.group_norm(
            layers.outputs(x, m[0].weight, g, layers.standardized) + along(m[0].bias, x), 3
        ),
        m,
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {"ws_gn": {"num_groups": 3}}


@pytest.mark.parametrize("training", [True, False])
@each_geometry
@pytest.mark.parametrize("norm", RULES)
def test_outputs_and_gradients_are_the_formulas(
    norm: str, geometry: Geometry, training: bool
) -> None:
    model = normswap.convert(net(geometry), norm, **OPTIONS.get(norm, {})).train(training)
    x, other = (values(3, IN, 6, 5).requires_grad_() for _ in range(2))
    y, expected = model(x), RULES[norm](other, model, geometry)
    close(y, expected)
    wanted = dict(model.named_parameters())
    found = torch.autograd.grad(y, [x, *wanted.values()], values(*y.shape, seed=1))
    like = torch.autograd.grad(expected, [other, *wanted.values()], values(*y.shape, seed=1))
    for one, other_one in zip(found, like, strict=True):
        close(one, other_one)


@pytest.mark.parametrize("norm", RULES)
def test_numerical_gradients(norm: str) -> None:
    model = normswap.convert(net(), norm, **OPTIONS.get(norm, {}))
    names = [name for name, _ in model.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [values(2, IN, 4, 3), *(p.detach().clone() for p in model.parameters())]
    assert torch.autograd.gradcheck(run, [each.requires_grad_() for each in inputs])


@pytest.mark.parametrize("norm", ["cosine", "pearson", "ws_gn"])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_other_layers_are_as_a_convolution_of_two_dimensions(norm: str, dim: int) -> None:
    options = {"num_groups": 3} if norm == "ws_gn" else {}
    made = {
        0: (nn.Linear(IN, OUT), nn.BatchNorm1d(OUT), (3, IN), (3, IN, 1, 1)),
        1: (nn.Conv1d(IN, OUT, 3), nn.BatchNorm1d(OUT), (3, IN, 7), (3, IN, 7, 1)),
        3: (nn.Conv3d(IN, OUT, (1, 3, 2)), nn.BatchNorm3d(OUT), (3, IN, 1, 6, 5), (3, IN, 6, 5)),
    }
    layer, norm_module, shape, flat = made[dim]
    kernel = {0: (1, 1), 1: (3, 1), 3: (3, 2)}[dim]
    model: Any = fill(nn.Sequential(layer, norm_module))
    other = net(Geometry(kernel))
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight.reshape(other[0].weight.shape))
        other[0].bias.copy_(model[0].bias)
        other[1].load_state_dict(model[1].state_dict())
    x = values(*shape)
    y = normswap.convert(model, norm, example_inputs=x, **options)(x)
    expected = normswap.convert(other, norm, **options)(x.reshape(flat))
    close(y.flatten(2) if dim else y[..., None], expected.flatten(2))


@pytest.mark.parametrize("padding", ["same", 2])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("norm", LAYERS)
def test_padding_of_every_kind_is_the_layers_own(norm: str, mode: str, padding: Any) -> None:
    one = net()
    one[0] = fill(nn.Conv2d(IN, OUT, 3, padding=padding, padding_mode=mode))
    other = copy.deepcopy(one)
    other[0].padding, other[0].padding_mode = (0, 0), "zeros"
    size = 1 if padding == "same" else padding
    x, shape = values(3, IN, 6, 5), (size,) * 4
    options = {"burnin": 0} if norm == "cbn" else {}
    one, other = (normswap.convert(m, norm, **options) for m in (one, other))
    for step in range(3):
        close(one(x + step), other(
            nn.functional.pad(x + step, shape, "constant" if mode == "zeros" else mode)
        ))  # fmt: skip
        with torch.no_grad():
            for model in (one, other):
                model[0].weight.add_(values(*model[0].weight.shape, seed=step), alpha=0.01)


@pytest.mark.parametrize("norm", ["cosine", "pearson"])
def test_the_start_is_exact_for_patches_of_the_expected_length(norm: str) -> None:
    """Of pointwise patches on a sphere about zero: signs in a balanced design."""
    model: Any = net(GEOMETRIES["pointwise"]).eval()
    signs = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.double)
    x = torch.cat([signs, -signs])[:, :, None, None] * 3
    with torch.no_grad():
        model[0].weight.sub_(model[0].weight.mean(1, keepdim=True))
        # What such patches have in running statistics, whatever the filters.
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3), correction=0))
        by_filter = model[0].weight.square().sum((1, 2, 3)) * 36 / 3
    close(model[1].running_var, by_filter)  # three directions share the length of 36
    expected = model(x)
    converted = normswap.convert(model, norm)
    # Isotropic in the three directions that there are, of four that the start knows of.
    scale = (4 / 3) ** 0.5
    bias = converted[1].bias.view(1, -1, 1, 1)
    torch.testing.assert_close((converted(x) - bias) / scale + bias, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["cosine", "pearson"])
def test_the_bias_is_put_aside_and_comes_back(norm: str) -> None:
    model = net()
    bias, before = model[0].bias, copy.deepcopy(model.state_dict())
    normswap.convert(model, norm)
    assert model[0].bias is None
    assert "0.bias" not in model.state_dict()
    model.float()
    normswap.revert(model)
    assert model[0].bias is bias
    assert bias.dtype == torch.float32
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("norm", LAYERS)
def test_the_layer_keeps_itself_and_gets_its_class_back(norm: str) -> None:
    model = net()
    layer, weight, cls = model[0], model[0].weight, type(model[0])
    normswap.convert(model, norm)
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer, nn.Conv2d)
    assert type(layer) is not cls
    normswap.revert(model)
    assert type(layer) is cls


@pytest.mark.parametrize("norm", LAYERS)
def test_copies_pickles_and_files_compute_the_same(norm: str, tmp_path: Any) -> None:
    model = normswap.convert(net(), norm).eval()
    x = values(2, IN, 5, 5)
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(net().eval(), tmp_path / "model.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        close(other(x), model(x))
        assert type(other[0]) is type(model[0])
        assert type(normswap.revert(other)[0]) is nn.Conv2d


@pytest.mark.parametrize("norm", LAYERS)
def test_the_same_call_twice_changes_nothing_more(norm: str) -> None:
    model = normswap.convert(net(), norm)
    cls, new = type(model[0]), model[1]
    normswap.convert(model, norm)
    assert type(model[0]) is cls
    assert model[1] is new


@pytest.mark.parametrize("norm", LAYERS)
def test_a_failure_leaves_the_layer_as_it_was(norm: str, monkeypatch: Any) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(
        "normswap.swap.changes._bind_hooks", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        normswap.convert(model, norm)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class Shared(nn.Module):
    """A convolution whose output is read twice, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(IN, OUT, 3), nn.BatchNorm2d(OUT)
        self.up, self.bn2 = nn.ConvTranspose2d(OUT, OUT, 3), nn.BatchNorm2d(OUT)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn2(self.up(self.bn1(y) + y))


@pytest.mark.parametrize("norm", LAYERS)
def test_what_no_layer_feeds_alone_is_refused_with_the_reason(norm: str) -> None:
    model = Shared()
    with pytest.raises(NothingToConvert) as refused:
        normswap.convert(model, norm)
    assert "bn1" in str(refused.value)
    assert "something else reads the output of conv" in str(refused.value)
    assert "bn2" in str(refused.value)
    assert "transposed" in str(refused.value)
    assert type(model.conv) is nn.Conv2d


def test_filters_of_single_numbers_have_no_deviation() -> None:
    model = nn.Sequential(nn.Conv2d(OUT, OUT, 1, groups=OUT), nn.BatchNorm2d(OUT))
    with pytest.raises(NothingToConvert, match="single numbers"):
        normswap.convert(model, "ws_gn")


# -- cross-iteration batch normalization ------------------------------------------------------


def stepped(model: Any, formula: CrossIteration, step: int) -> None:
    """One training step of norm and formula on the same batch, compared; then new weights."""
    x, other = (values(3, IN, 6, 5, seed=20 + step).requires_grad_() for _ in range(2))
    y = model(x)
    conv, norm = model
    expected = formula(other, conv.weight, conv.bias, norm.weight, norm.bias)
    close(y, expected)
    names = [conv.weight, norm.weight, norm.bias]
    found = torch.autograd.grad(y, [x, *names], values(*y.shape, seed=1))
    like = torch.autograd.grad(expected, [other, *names], values(*y.shape, seed=1))
    for one, other_one in zip(found, like, strict=True):
        close(one, other_one)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(values(*parameter.shape, seed=50 + step + index), alpha=0.1)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("rule", ["max", "drop"])
@each_geometry
def test_cbn_is_the_papers_formula(geometry: Geometry, rule: str, outside: bool) -> None:
    options = {"drop_negative": rule == "drop", "eps_outside": outside}
    model = normswap.convert(net(geometry), "cbn", burnin=0, **options)
    formula = CrossIteration(geometry, 3, rule, outside)
    for step in range(6):
        stepped(model, formula, step)


def test_cbn_predicts_variances_below_zero_now_and_then() -> None:
    """Or the two rules would not be told apart."""
    results = []
    for drop in (False, True):
        model = normswap.convert(net(), "cbn", burnin=0, drop_negative=drop)
        for step in range(3):
            y = model(values(3, IN, 6, 5, seed=20 + step))
            with torch.no_grad():
                model[0].weight.add_(values(*model[0].weight.shape, seed=50 + step))
        results.append(y)
    assert not torch.allclose(*results)


def test_cbn_keeps_what_batch_norm_keeps() -> None:
    model, plain = normswap.convert(net(), "cbn", burnin=0), net()
    for step in range(3):
        x = values(3, IN, 6, 5, seed=step)
        model(x), plain(x)
    close(model[1].running_mean, plain[1].running_mean)
    close(model[1].running_var, plain[1].running_var)
    assert model[1].num_batches_tracked == 3
    close(model.eval()(x), plain.eval()(x))


def test_cbn_is_batch_norm_until_it_is_burnt_in() -> None:
    model, plain = normswap.convert(net(), "cbn", burnin=2), net()
    outputs = []
    for step in range(4):
        x = values(3, IN, 6, 5, seed=step)
        outputs.append((model(x), plain(x)))
        with torch.no_grad():
            for each in (model, plain):
                each[0].weight.add_(values(*each[0].weight.shape, seed=step), alpha=0.1)
    close(*outputs[0])
    close(*outputs[1])
    close(*outputs[2])  # the first that is remembered has none before it
    assert not torch.allclose(*outputs[3])


def test_checkpointing_gives_the_same_gradients_to_the_bit() -> None:
    gradients = []
    for recomputed in (None, False, True):
        model: Any = normswap.convert(net(), "cbn", burnin=0)
        seen = []
        for step in range(6):
            x = values(3, IN, 6, 5, seed=step).requires_grad_()
            y = model(x) if recomputed is None else checkpoint(model, x, use_reentrant=recomputed)
            y.square().sum().backward()
            seen += [x.grad, model[0].weight.grad.clone()]
            with torch.no_grad():
                model[0].weight.add_(values(*model[0].weight.shape, seed=step), alpha=0.1)
        gradients.append(seen)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_what_is_not_the_layers_output_is_refused_by_name() -> None:
    model: Any = normswap.convert(net(), "cbn", burnin=0)
    with pytest.raises(NormSwapError, match=r"^1: in training"):
        model[1](values(3, OUT, 4, 4))


def test_statistics_passes_look_at_the_batch_alone() -> None:
    model, plain = normswap.convert(net(), "cbn", burnin=0), net()
    loader = [values(4, IN, 6, 5, seed=step) for step in range(3)]
    model(loader[0])
    history = model[1].history
    for method in ("pooled", "ema", "population"):
        for each in (model, plain):
            normswap.warmup(each, loader, method=method, progress=False)
        close(model[1].running_mean, plain[1].running_mean)
        close(model[1].running_var, plain[1].running_var)
    assert model[1].history == history


def test_a_weight_that_was_trained_since_keeps_its_values_on_revert() -> None:
    """Only what a start rewrote must be as it was."""
    model = normswap.convert(net(), "ws_gn")
    with torch.no_grad():
        model[0].weight.add_(1)
    trained = model[0].weight.clone()
    normswap.revert(model)
    assert torch.equal(model[0].weight, trained)


# -- one after another ------------------------------------------------------------------------

PAIRS = [(a, b) for a in LAYERS for b in (*LAYERS, "bn", "fold") if a != b]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_after_another_is_right_or_refused(first: str, second: str) -> None:
    model = net().eval()
    x = values(2, IN, 5, 5)
    expected, cls = model(x), type(model[0])
    normswap.convert(model, first)
    if first != "cbn" and second != "bn":
        with pytest.raises(NothingToConvert, match=r"revert has to come first|no fixed affine"):
            normswap.convert(model, second, where="*")
    else:
        normswap.convert(model, second, where="*")
    if first == "cbn" and second in ("bn", "fold"):
        assert type(model[0]) is cls
        close(model(x), expected)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        normswap.revert(other)
        assert type(other[0]) is cls
        close(other(x), expected)


def test_inside_a_block_cbn_keeps_what_it_needs_for_afterwards() -> None:
    model = normswap.convert(net(), "cbn", burnin=0)
    with normswap.converted(model, "cosine", where="*"):
        model(values(2, IN, 5, 5))
    model(values(2, IN, 5, 5))
    assert len(model[1].history) == 1


def test_a_layer_that_was_remade_is_not_folded_into() -> None:
    model = normswap.convert(normswap.convert(net(), "ws_gn"), "bn", where="*")
    model(values(8, IN, 5, 5))
    with pytest.raises(NothingToConvert, match="StandardizedWeight"):
        normswap.convert(model, "fold", where="*")


def test_a_parametrization_on_a_remade_layer_has_to_go_first() -> None:
    model = normswap.convert(net(), "ws_gn")
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(CannotRevert, match="parametrization"):
        normswap.revert(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(normswap.revert(model)[0]) is nn.Conv2d


@pytest.mark.parametrize("burnin", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_does_not_count_towards_the_burn_in(reentrant: bool, burnin: int) -> None:
    seen = []
    for recomputed in (False, True):
        model: Any = normswap.convert(net(), "cbn", burnin=burnin)
        gradients = []
        for step in range(5):
            x = values(3, IN, 6, 5, seed=step).requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if recomputed else model(x)
            y.square().sum().backward()
            gradients.append(x.grad)
            with torch.no_grad():
                model[0].weight.add_(values(*model[0].weight.shape, seed=step), alpha=0.1)
        seen.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_history_stays_behind_where_the_model_moves() -> None:
    model: Any = normswap.convert(net(), "cbn", burnin=0)
    model(values(3, IN, 6, 5))
    assert model[1].history
    model.float()
    assert not model[1].history
    model(values(3, IN, 6, 5).float())


def test_a_hook_on_the_layer_stands_in_the_way_of_cbn() -> None:
    model = net()
    model[0].register_full_backward_hook(lambda *args: None)
    with pytest.raises(NothingToConvert, match="a hook"):
        normswap.convert(model, "cbn")
