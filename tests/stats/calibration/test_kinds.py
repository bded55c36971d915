"""Models, outputs and precisions of all kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap
from normswap.errors import StatisticsError
from tests.reference.calibration import least_squares, relative_error
from tests.reference.data import close, fill, values
from tests.stats.calibration.nets import affines, batches, bits, conv_net, images, pair_of, settled


class Wrapped(nn.Module):
    """The net, run as told, with a norm that no forward reaches."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.net = conv_net()
        self.unused = nn.BatchNorm2d(4).double()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.net, x)


def amid_inference(net: nn.Module, x: Tensor) -> Tensor:
    """Ends in an operation that only inference mode allows on its tensors."""
    with torch.inference_mode():
        return net(x).mul_(2)


def without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def cast_inside(net: nn.Module, x: Tensor) -> Tensor:
    """Its last layer fits its inputs only under its own autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(x.float()) + 0


def modes() -> list[Any]:
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *cast]


@pytest.mark.parametrize("how", [amid_inference, without_gradient])
def test_an_output_without_gradient_is_fitted_but_not_refined(how: Any) -> None:
    before = modes()
    model = normswap.convert(Wrapped(how).eval(), "gn", num_groups=2, carry="fresh")
    report = normswap.calibrate(model, batches())
    assert report.kept == "fitted"
    assert "no gradient" in report.note
    assert modes() == before
    plain, _ = pair_of(conv_net(), carry="fresh")
    normswap.calibrate(plain, batches(), refine_passes=0)
    for found, wanted in zip(affines(model.net), affines(plain), strict=True):
        close(found, wanted)


def test_modes_that_a_model_sets_are_its_own() -> None:
    before = modes()
    model = normswap.convert(Wrapped(cast_inside).float().eval(), "gn", num_groups=2)
    report = normswap.calibrate(model, batches())
    assert len(report.calibrated) == 2
    assert modes() == before


def test_under_autocast() -> None:
    before = modes()
    model, _ = pair_of(conv_net().float(), carry="fresh")
    data = [batch.float() for batch in batches()]
    full = copy.deepcopy(model)
    report = normswap.calibrate(model, data, amp=torch.bfloat16, refine_passes=0)
    normswap.calibrate(full, data, refine_passes=0)
    assert report.kept == "fitted"
    assert modes() == before
    for found, wanted in zip(affines(model), affines(full), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refined_in_full(dtype: torch.dtype) -> None:
    half, _ = pair_of(conv_net().to(dtype), carry="copy")
    full, _ = pair_of(conv_net(), carry="copy")
    data = batches(10)
    report = normswap.calibrate(half, [batch.to(dtype) for batch in data], refine_passes=10)
    expected = normswap.calibrate(full, data, refine_passes=10)
    assert report.kept == expected.kept == "refined"
    for found, wanted in zip(affines(half), affines(full), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)


def test_a_norm_that_no_batch_reaches_is_left() -> None:
    model = normswap.convert(Wrapped(lambda net, x: net(x)).eval(), "gn", num_groups=2)
    unused = bits(model.unused)
    report = normswap.calibrate(model, batches())
    assert [row.path for row in report.calibrated] == ["net.1", "net.4"]
    assert [(row.path, row.status) for row in report.left] == [("unused", "no batch reached it")]
    assert bits(model.unused) == unused
    told = {row.path: str(row.fidelity) for row in normswap.report(model)}
    assert told == {"net.1": "calibrated", "net.4": "calibrated", "unused": "matched"}


def test_a_forward_that_runs_another_model_is_told() -> None:
    model, _ = pair_of(conv_net())
    before = bits(model)
    with pytest.raises(StatisticsError, match="does forward= run the model"):
        normswap.calibrate(model, batches(), forward=lambda _, batch: model(batch))
    assert bits(model) == before


@pytest.mark.parametrize("result", [lambda y: y.argmax(1), lambda y: None, lambda y: y.numpy()])
def test_what_cannot_be_compared_is_refused(result: Any) -> None:
    model, _ = pair_of(conv_net())
    before = bits(model)
    with pytest.raises(StatisticsError, match="nothing to compare"):
        normswap.calibrate(model, batches(), forward=lambda m, x: result(m(x)))
    assert bits(model) == before


def test_outputs_of_other_shapes_are_refused() -> None:
    model, _ = pair_of(conv_net())
    sizes = iter(range(1, 100))
    with pytest.raises(StatisticsError, match="does not return what the original returns"):
        normswap.calibrate(model, batches(), forward=lambda m, x: m(x)[: next(sizes)])


def test_what_the_original_masks_is_not_compared() -> None:
    def masked(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return torch.cat([y, torch.full_like(y, -torch.inf)], 1)

    model, _ = pair_of(conv_net())
    plain = copy.deepcopy(model)
    report = normswap.calibrate(model, batches(), forward=masked)
    expected = normswap.calibrate(plain, batches())
    assert report.output_after == pytest.approx(expected.output_after)
    for found, wanted in zip(affines(model), affines(plain), strict=True):
        close(found, wanted)


def test_an_output_that_was_not_finite_is_worse_than_any() -> None:
    model, _ = pair_of(conv_net())
    with torch.no_grad():
        model[4].bias[0] = torch.nan
    report = normswap.calibrate(model, batches(), refine_passes=0)
    assert (report.kept, report.output_before) == ("fitted", torch.inf)
    assert report.output_after < 1


def test_a_batch_without_samples_changes_nothing() -> None:
    model, _ = pair_of(conv_net())
    other = copy.deepcopy(model)
    data = batches(3)
    normswap.calibrate(model, [data[0], data[0][:0], data[1], data[0][:0], data[2]])
    normswap.calibrate(other, data)
    for found, wanted in zip(affines(model), affines(other), strict=True):
        close(found, wanted)


def test_the_root_may_be_the_norm() -> None:
    original = settled(fill(nn.BatchNorm2d(3)), images(40))
    model, _ = pair_of(original, num_groups=1, carry="fresh")
    with torch.no_grad():
        bare = copy.deepcopy(model)
        bare.weight.fill_(1)
        bare.bias.zero_()
        columns = [m(images(40)).movedim(1, 0).flatten(1) for m in (bare, original)]
    report = normswap.calibrate(model, batches(), refine_passes=0)
    assert report.kept == "fitted"
    for found, wanted in zip(affines(model), least_squares(*columns), strict=True):
        close(found, wanted)
    held = batches()[4]
    with torch.no_grad():
        error = relative_error(model(held), original(held))
    assert report.output_after == pytest.approx(error, rel=1e-9)
    assert report[0].after == pytest.approx(error, rel=1e-9)


def test_a_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = fill(nn.TransformerEncoder(layer, 2)).eval()
    data = list(values(20, 5, 8).split(4))
    with torch.no_grad():
        wanted = model(data[4])
    normswap.convert(model, "rms", where="*", carry="fresh", calibrate=data)
    assert {str(row.fidelity) for row in normswap.report(model)} == {"calibrated"}
    with torch.no_grad():
        assert relative_error(model(data[4]), wanted) < 0.7
        normswap.revert(model)
        assert torch.equal(model(data[4]), wanted)


def test_a_wrapper_is_seen_through() -> None:
    model, _ = pair_of(conv_net())
    plain = copy.deepcopy(model)
    normswap.calibrate(torch.compile(model, backend="eager"), batches())
    normswap.calibrate(plain, batches())
    for found, wanted in zip(affines(model), affines(plain), strict=True):
        close(found, wanted)


def test_data_parallel_is_converted_and_calibrated() -> None:
    model = normswap.convert(nn.DataParallel(conv_net()), "gn", num_groups=2, calibrate=batches())
    assert {str(row.fidelity) for row in normswap.report(model)} == {"calibrated"}


def test_a_hooks_computed_attribute_is_no_obstacle() -> None:
    net = conv_net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[0])
    net(images(2))
    assert not net[0].weight.is_leaf
    model = normswap.convert(net, "gn", num_groups=2)
    assert len(normswap.calibrate(model, batches()).calibrated) == 2


def test_parametrized_neighbours_are_no_obstacle() -> None:
    net = conv_net()
    parametrizations.weight_norm(net[3])
    model = normswap.convert(net, "gn", num_groups=2)
    assert len(normswap.calibrate(model, batches()).calibrated) == 2


class Forked(nn.Module):
    """Takes its norms in an order that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 1) if x.flatten()[0] > 0 else (1, 0)
        for place in order:
            x = self.norms[place](x)
        return x


def test_batches_that_take_different_ways_are_refused() -> None:
    model = normswap.convert(fill(Forked()).eval(), "gn", num_groups=1)
    data = [images(4), -images(4)]
    assert (data[0].flatten()[0] > 0) != (data[1].flatten()[0] > 0)
    before = bits(model)
    with pytest.raises(StatisticsError, match="different ways"):
        normswap.calibrate(model, data)
    assert bits(model) == before
