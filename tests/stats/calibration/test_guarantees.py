"""What a calibration promises: never worse, reported as it is, nothing else changed, all undone."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, StatisticsError
from tests.reference.calibration import outputs, relative_error, simply
from tests.reference.footprint import footprint, random_states
from tests.stats.calibration.nets import (
    NORMS,
    batches,
    bits,
    conv_net,
    images,
    pair_of,
)


def error_of(model: nn.Module, original: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return relative_error(
            torch.cat([model(x) for x in data]), torch.cat([original(x) for x in data])
        )


@pytest.mark.parametrize("carry", ["auto", "copy", "fresh"])
@pytest.mark.parametrize("to", ["gn", "in", "ln"])
def test_it_is_never_worse_and_reported_as_it_is(to: str, carry: str) -> None:
    model, original = pair_of(conv_net(), to, carry=carry)
    data, held = batches(11), [batches(11)[i] for i in (4, 9)]
    before = error_of(model, original, held)
    site_before = {
        path: relative_error(*(outputs(m, path, held, 1, simply) for m in (model, original)))
        for path in NORMS
    }
    report = normswap.calibrate(model, data)
    assert report.output_before == pytest.approx(before, rel=1e-9)
    assert report.output_after == pytest.approx(error_of(model, original, held), rel=1e-9)
    assert report.output_after <= min(report.output_before, report.output_fitted)
    kept = {"as before": report.output_before, "fitted": report.output_fitted}
    assert report.output_after == kept.get(report.kept, report.output_after)
    for row in report:
        after = relative_error(*(outputs(m, row.path, held, 1, simply) for m in (model, original)))
        assert row.before == pytest.approx(site_before[row.path], rel=1e-9)
        assert row.after == pytest.approx(after, rel=1e-9)
    assert (report.batches, report.held_out, report.samples) == (11, 2, 88)


def test_what_is_better_already_stays_to_the_bit() -> None:
    model, _ = pair_of(conv_net())
    normswap.calibrate(model, batches(), refine_passes=0)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = normswap.calibrate(model, batches(), refine_passes=0)
    assert report.kept == "as before"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name])


def test_statistics_that_do_not_help_are_not_kept_either() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()).double().eval()
    model, original = pair_of(net, "bn", where="*")
    normswap.calibrate(model, batches())
    known = bits(model)
    # Another data set's statistics, judged by a batch of the first: these are worse.
    worse = [images(8, seed=5) * 9 + 40 for _ in range(9)]
    worse[4] = batches()[4]
    report = normswap.calibrate(model, worse, refine_passes=0)
    assert report.kept == "as before"
    assert report.output_after == pytest.approx(error_of(model, original, [worse[4]]), rel=1e-9)
    assert bits(model) == known


def test_one_batch_judges_itself_and_the_report_says_so() -> None:
    model, original = pair_of(conv_net(), carry="fresh")
    report = normswap.calibrate(model, batches(1))
    assert (report.batches, report.held_out, report.kept) == (1, 0, "fitted")
    assert "second batch" in report.note
    assert report.note in report.summary()
    after = error_of(model, original, batches(1))
    assert report.output_after == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (4, 1), (5, 1), (9, 1), (10, 2)])
def test_how_many_are_held_out(count: int, held: int) -> None:
    model, _ = pair_of(conv_net())
    assert normswap.calibrate(model, batches(count, 2), refine_passes=1).held_out == held


def test_budgets() -> None:
    model, _ = pair_of(conv_net())
    assert normswap.calibrate(model, batches(), batches=3).samples == 24
    assert normswap.calibrate(model, batches(), samples=9).samples == 16


def test_a_report_is_plain_data() -> None:
    model, _ = pair_of(conv_net())
    told = json.loads(json.dumps(normswap.calibrate(model, batches()).to_dict()))
    assert [site["path"] for site in told["sites"]] == NORMS
    assert told["method"] == "least_squares"


class Marking(nn.Module):
    """Keeps a buffer that every call changes, overwrites its input, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        torch.rand(1)
        return self.net(x.mul_(0.5))


def test_nothing_changes_but_the_affines() -> None:
    model = normswap.convert(Marking(), "gn", num_groups=2)
    model.net[0].weight.requires_grad_(False)
    model.net[1].weight.requires_grad_(False)
    model.net[3].train()
    model.net[4].register_forward_hook(lambda *args: None)
    optimizer = torch.optim.Adam(model.parameters())
    model(images(2)).sum().backward()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    data, before = batches(), footprint(model)
    copies, states = [x.clone() for x in data], random_states()
    report = normswap.calibrate(model, data)
    assert report.kept != "as before"
    after = footprint(model)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    norms = ("net.1", "net.4")
    assert changed == {f"{path}.{name}" for path in norms for name in ("_parameters", RECORD)}
    both = before["net.1._parameters"], after["net.1._parameters"]
    for (name, one), (other, two) in zip(*both, strict=True):
        assert (name, one[:6]) == (other, two[:6])  # the same object, with other values
    assert random_states() == states
    assert all(torch.equal(one, two) for one, two in zip(copies, data, strict=True))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    moments = kept["state"].values(), optimizer.state_dict()["state"].values()
    for one, two in zip(*moments, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


RECORD = "_normswap_record"


class Planned(Exception):
    """Raised on purpose."""


class Fuse:
    """Fails at its so-manyth call."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.left, self.error = calls, error

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.left -= 1
        torch.rand(1)
        if not self.left:
            raise self.error("on purpose")
        return model(x)

    def __deepcopy__(self, memo: Any) -> Fuse:
        return self


class Fused(nn.Module):
    """A net with a fuse."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        super().__init__()
        self.net, self.fuse = conv_net(), Fuse(calls, error)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.net, x)


#: Forwards of the fit, of the differences before it, and of each later part, for five batches.
CALLS = [1, 2, 7, 10, 11, 13, 14, 18, 20, 30]


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("calls", CALLS)
def test_a_failing_model_leaves_all_as_it_was(calls: int, error: type[BaseException]) -> None:
    model, _ = pair_of(conv_net())
    before, states = footprint(model), random_states()
    with pytest.raises(error):
        normswap.calibrate(model, batches(), forward=Fuse(calls, error))
    assert footprint(model) == before
    assert random_states() == states


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("calls", CALLS)
def test_a_failing_conversion_leaves_all_as_it_was(calls: int, error: type[BaseException]) -> None:
    model = normswap.convert(Fused(calls, error).eval(), "ln")
    before, states = footprint(model), random_states()
    with pytest.raises(error):
        normswap.convert(
            model, "gn", num_groups=2, where="*", calibrate=batches(), example_inputs=images(2)
        )
    assert footprint(model) == before
    assert random_states() == states


def ends_badly(error: type[BaseException]) -> Iterator[Tensor]:
    yield from batches(3)
    raise error("on purpose")


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
def test_a_failing_loader_leaves_all_as_it_was(error: type[BaseException]) -> None:
    model, original = pair_of(conv_net())
    before, source = footprint(model), footprint(original)
    with pytest.raises(error):
        normswap.calibrate(model, ends_badly(error))
    with pytest.raises(error):
        normswap.convert(original, "gn", num_groups=2, calibrate=ends_badly(error))
    assert footprint(model) == before
    assert footprint(original) == source


@pytest.mark.parametrize("place", [0, 2, 4])
def test_data_that_is_not_finite_is_refused(place: int) -> None:
    model, _ = pair_of(conv_net())
    before, data = footprint(model), batches()
    data[place][0, 0, 0, 0] = torch.nan
    with pytest.raises(StatisticsError, match=f"1: .*not finite in batch {place}"):
        normswap.calibrate(model, data)
    assert footprint(model) == before


def test_no_data_is_refused() -> None:
    model, original = pair_of(conv_net())
    before = footprint(model)
    for nothing in ([], iter([]), [images(1)[:0]]):
        with pytest.raises(StatisticsError, match="no sample"):
            normswap.calibrate(model, nothing)
    assert footprint(model) == before
    source = footprint(original)
    with pytest.raises(StatisticsError, match="no batch"):
        normswap.convert(original, "gn", calibrate=[])
    assert footprint(original) == source


def test_what_was_never_converted_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"call normswap\.convert first"):
        normswap.calibrate(conv_net(), batches())


def test_arguments_that_mean_nothing_are_refused() -> None:
    model, _ = pair_of(conv_net())
    with pytest.raises(OptionError, match="method='best'"):
        normswap.calibrate(model, batches(), method="best")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="refine_passes=-1"):
        normswap.calibrate(model, batches(), refine_passes=-1)


def spoils_gradients(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sigmoid().mul_(2)


def test_a_model_that_cannot_be_run_with_gradients_says_what_to_do() -> None:
    model, _ = pair_of(conv_net())
    before = footprint(model)
    with pytest.raises(StatisticsError, match="refine_passes=0"):
        normswap.calibrate(model, batches(), forward=spoils_gradients)
    assert footprint(model) == before
    normswap.calibrate(model, batches(), forward=spoils_gradients, refine_passes=0)


@pytest.mark.parametrize("carry", ["auto", "copy", "fresh"])
@pytest.mark.parametrize("to", ["gn", "ln", "in"])
def test_revert_brings_the_original_back_to_the_bit(to: str, carry: str) -> None:
    model = conv_net()
    before, data = bits(model), images(8)
    with torch.no_grad():
        wanted = model(data)
    options = {"num_groups": 2} if to == "gn" else {}
    normswap.convert(model, to, carry=carry, **options)
    for _ in range(2):
        normswap.calibrate(model, batches())
    normswap.revert(model)
    assert bits(model) == before
    with torch.no_grad():
        assert torch.equal(model(data), wanted)


def test_a_chain_leads_back_to_the_first() -> None:
    model = conv_net()
    before = bits(model)
    normswap.convert(model, "ln")
    normswap.convert(model, "gn", num_groups=2, where="*", calibrate=batches())
    normswap.convert(model, "in", where="*", calibrate=batches())
    assert {str(row.fidelity) for row in normswap.report(model)} == {"calibrated"}
    normswap.convert(model, "ln", where="*")
    normswap.revert(model)
    assert [type(model.get_submodule(path)) for path in NORMS] == [nn.BatchNorm2d] * 2
    assert bits(model) == before


def test_new_statistics_go_with_a_revert() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()).double().eval()
    before = bits(model)
    normswap.convert(model, "bn", where="*", calibrate=batches())
    assert model[1].running_mean.any()
    assert normswap.report(model)[0].fidelity == "calibrated"
    normswap.revert(model)
    assert bits(model) == before


def saved_and_loaded(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("move", [copy.deepcopy, saved_and_loaded, through_torch])
def test_a_calibrated_model_is_copied_and_reverted(move: Any) -> None:
    original = conv_net()
    model = normswap.convert(copy.deepcopy(original), "gn", num_groups=2, calibrate=batches())
    moved = move(model)
    assert bits(moved) == bits(model)
    assert str(normswap.report(moved)) == str(normswap.report(model))
    normswap.revert(moved)
    assert bits(moved) == bits(original)
    assert bits(model) != bits(original)


def test_a_calibrated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    original = conv_net()
    model = normswap.convert(copy.deepcopy(original), "gn", num_groups=2, calibrate=batches())
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(copy.deepcopy(original), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images(8)), model(images(8)))


def test_least_squares_leave_nothing_that_a_gain_or_an_offset_could_mend() -> None:
    model, original = pair_of(conv_net(), carry="fresh")
    normswap.calibrate(model, batches(), refine_passes=0)
    data = images(40)
    for path in NORMS:
        ours, theirs = (outputs(m, path, [data], 1, simply) for m in (model, original))
        rest = ours - theirs
        assert rest.mean(1).abs().max() < 1e-12
        norm: Any = model.get_submodule(path)
        with torch.no_grad():
            bare = (ours - norm.bias[:, None]) / norm.weight[:, None]
        assert (rest * bare).mean(1).abs().max() < 1e-12
