"""The fit norm by norm equals plain forwards, one norm after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.calibration import (
    columns,
    equal_moments,
    fit_one_by_one,
    least_squares,
    relative_error,
)
from tests.reference.data import close, fill, values
from tests.stats.calibration.nets import (
    NORMS,
    affines,
    bits,
    conv_net,
    grouped,
    images,
    pair_of,
    settled,
)

DATA = images(40)


def fresh_pair(original: nn.Module, to: str = "gn", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A converted copy that starts with nothing, so that the fit is better and is kept."""
    return pair_of(original, to, carry="fresh", **options)


def assert_fitted_as(
    model: nn.Module, original: nn.Module, paths: Sequence[str], data: Sequence[Any], **how: Any
) -> None:
    """Assert that a fit of the model equals the reference's to 1e-10."""
    expected = copy.deepcopy(model)
    fit_one_by_one(expected, original, paths, data, **how)
    run = how.get("run")
    method = "moments" if how.get("fit") is equal_moments else "least_squares"
    report = normswap.calibrate(model, data, method=method, refine_passes=0, forward=run)
    assert report.kept == "fitted"
    for found, wanted in zip(affines(model), affines(expected), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7] * 5 + [5], [2, 0, 31, 7]])
def test_however_the_data_is_cut(sizes: list[int]) -> None:
    model, original = fresh_pair(conv_net())
    assert_fitted_as(model, original, NORMS, DATA.split(sizes))


@pytest.mark.parametrize("to", ["in", "ln", "gn"])
@pytest.mark.parametrize("fit", [least_squares, equal_moments])
def test_methods_and_norms(to: str, fit: Any) -> None:
    net = conv_net()
    if fit is equal_moments:  # whose sign is that of the gain before
        for path in NORMS:
            net.get_submodule(path).weight.data.abs_()
    model, original = fresh_pair(net, to)
    assert_fitted_as(model, original, NORMS, DATA.split(9), fit=fit)


class Tokens(nn.Module):
    """Two residual blocks over tokens, with LayerNorms."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6, bias=bias) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = tokens + layer(norm(tokens)).tanh()
        return tokens


@pytest.mark.parametrize("bias", [True, False])
def test_tokens_with_and_without_an_offset(bias: bool) -> None:
    model, original = fresh_pair(fill(Tokens(bias=bias)).eval(), "rms", where="*")
    assert (model.norms[0].bias is not None) == bias
    data = list(values(12, 5, 6).split([5, 1, 6]))
    fit = lambda z, y: least_squares(z, y, offset=bias)  # noqa: E731
    assert_fitted_as(model, original, ["norms.0", "norms.1"], data, fit=fit, channel_dim=-1)


class Named(nn.Module):
    """Takes a dict and returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, pixels: Tensor, scale: Tensor) -> dict[str, Any]:
        y = self.net(pixels * scale)
        return {"logits": y, "more": [(y.square(), y.argmax(1)), None]}


def test_dict_batches_and_nested_outputs() -> None:
    model, original = fresh_pair(Named().eval())
    batches = [
        {"pixels": part, "scale": torch.ones(()).double(), "labels": torch.zeros(len(part))}
        for part in DATA.split(9)
    ]
    expected = copy.deepcopy(model)
    run = lambda m, batch: m(batch["pixels"], batch["scale"])  # noqa: E731
    fit_one_by_one(expected, original, ["net.1", "net.4"], batches, run=run)
    report = normswap.calibrate(model, batches, refine_passes=0)
    for found, wanted in zip(affines(model), affines(expected), strict=True):
        close(found, wanted)
    held = batches[4]
    with torch.no_grad():
        ours, theirs = run(model, held), run(original, held)
    flat = [torch.cat([y["logits"].flatten(), y["more"][0][0].flatten()]) for y in (ours, theirs)]
    assert report.output_after == pytest.approx(relative_error(*flat), rel=1e-9)


def test_a_forward_of_ones_own() -> None:
    model, original = fresh_pair(conv_net())
    run = lambda m, batch: m(batch["x"][0])  # noqa: E731
    assert_fitted_as(model, original, NORMS, [{"x": [part]} for part in DATA.split(9)], run=run)


def test_only_the_chosen_are_fitted() -> None:
    model, original = fresh_pair(conv_net())
    expected = copy.deepcopy(model)
    fit_one_by_one(expected, original, ["4"], DATA.split(9))
    report = normswap.calibrate(model, DATA.split(9), where="4", refine_passes=0)
    for found, wanted in zip(affines(model), affines(expected), strict=True):
        close(found, wanted)
    assert [(row.path, row.status) for row in report.left] == [("1", "not in where=")]


class Twice(nn.Module):
    """Calls one norm at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.norm(x).relu_()))


def test_a_norm_that_is_called_twice_is_fitted_to_both_calls() -> None:
    net = fill(Twice())
    model, original = fresh_pair(settled(net, DATA), num_groups=3)
    bare = copy.deepcopy(model)
    nn.init.ones_(bare.norm.weight)
    nn.init.zeros_(bare.norm.bias)
    with torch.no_grad():
        first = [m.norm(DATA) for m in (bare, original)]
        columns = [y.movedim(1, 0).flatten(1) for y in first]
        gain, offset = least_squares(*columns)
        fed = gain.view(1, -1, 1, 1) * first[0] + offset.view(1, -1, 1, 1)
        second = [m.norm(m.layer(y.relu())) for m, y in ((bare, fed), (original, first[1]))]
        both = [
            torch.cat([a, b.movedim(1, 0).flatten(1)], 1)
            for a, b in zip(columns, second, strict=True)
        ]
        expected = least_squares(*both)
    normswap.calibrate(model, DATA.split(7), refine_passes=0)
    for found, wanted in zip(affines(model), expected, strict=True):
        close(found, wanted)


def test_running_statistics_that_were_not_there_are_those_of_all_data_at_once() -> None:
    net = fill(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 1),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(16, 2),
        )
    ).eval()
    model, original = fresh_pair(net, "bn", where="*")
    normswap.calibrate(model, DATA.split(7), refine_passes=0)
    for path in NORMS:
        norm: Any = model.get_submodule(path)
        with torch.no_grad():  # what feeds the norm in eval mode, fitted layers included
            inputs = columns(model[: int(path)](DATA), 1)
        close(norm.running_mean, inputs.mean(1))
        close(norm.running_var, inputs.var(1))
        assert norm.num_batches_tracked == 6
    expected = copy.deepcopy(model)
    fit_one_by_one(expected, original, NORMS, DATA.split(7))
    for found, wanted in zip(affines(model), affines(expected), strict=True):
        close(found, wanted)


class Remembering(nn.Module):
    """Reads at every call what the call before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = 0.0 if self.last is None else self.last.mean()
        self.last = x.detach() * 2
        return self.net(x) + before


def remembering() -> nn.Module:
    return normswap.convert(Remembering().eval(), "gn", carry="fresh", num_groups=2)


def with_new_statistics() -> nn.Module:
    return normswap.convert(grouped(), "bn", where="*")


def of_two_norms() -> nn.Module:
    return fresh_pair(conv_net())[0]


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("make", [of_two_norms, with_new_statistics, remembering])
def test_what_waits_may_lie_in_a_file(make: Any, passes: int) -> None:
    found = []
    for memory in (None, 0):
        model = make()
        before = affines(model)
        report = normswap.calibrate(model, DATA.split(7), memory=memory, refine_passes=passes)
        assert any(not torch.equal(a, b) for a, b in zip(before, affines(model), strict=True))
        told = report.output_before, report.output_fitted, report.output_after
        found.append((bits(model), told))
    assert found[0] == found[1]
