"""What a calibration promises: never worse, reported as it is, and nothing else changed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.calibration import outputs, relative_error, simply
from tests.reference.footprint import footprint, random_states
from tests.stats.calibration.nets import (
    NORMS,
    batches,
    bits,
    conv_net,
    grouped,
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
    net = grouped()
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


@pytest.mark.parametrize("full", [0, 1, 4])
def test_batches_that_are_empty_judge_nothing_and_the_report_says_so(full: int) -> None:
    model, original = pair_of(conv_net(), carry="fresh")
    (batch,) = batches(1)
    loader = [batch if index == full else batch[:0] for index in range(5)]
    report = normswap.calibrate(model, loader)
    assert report.note == "not refined: the batches that are left for it are empty"
    assert (report.batches, report.held_out, report.kept) == (5, 0, "fitted")
    assert report.output_after == pytest.approx(error_of(model, original, [batch]), rel=1e-9)


def test_an_error_without_bound_is_null_in_strict_json() -> None:
    model, _ = pair_of(conv_net(), carry="fresh")
    report = normswap.calibrate(model, batches(1))
    report.output_before = float("inf")
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["output_before"] is None


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
