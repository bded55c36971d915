"""Stopping when enough is known: what is promised, and whether it is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from normswap.stats.convergence import Point
from tests.reference.data import values
from tests.reference.errors import effective, of_average, of_pooled
from tests.stats.models import cut, images, net, one_norm

UNEVEN = [5, 3, 8, 1, 6, 2, 7, 4, 9, 3, 5, 2, 8, 6]


def norm(channels: int = 3) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels).double()


def last(model: nn.Module, batches: list[Tensor], **options: Any) -> Point:
    """What is known in the end."""
    return normswap.warmup(model, batches, **options).convergence[-1]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_promises(point: Point, errors: tuple[Tensor, Tensor], *, rel: float = 1e-9) -> None:
    assert point.mean_error == pytest.approx(rms(errors[0]), rel=rel)
    assert point.var_error == pytest.approx(rms(errors[1]), rel=rel)


def drifting(sizes: list[int], *, centre: float = 0.0, spread: float = 1.0) -> list[Tensor]:
    """Batches whose means and deviations differ."""
    return [
        centre + spread * (values(size, 3, 2, 2, seed=index) * (1 + index % 3) + index % 5)
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "batches",
    [
        drifting([4] * 9),
        drifting(UNEVEN),
        drifting(UNEVEN, centre=1e6, spread=1e-3),
        [batch[..., :1, :1] for batch in drifting(UNEVEN)],  # one of them a single value
        [batch[:1, :, :1, :1] for batch in drifting(UNEVEN)],  # nothing but single values
    ],
    ids=["even", "uneven", "far from zero", "a single value", "single values"],
)
def test_the_errors_of_pooled_statistics(batches: list[Tensor]) -> None:
    rounding = 1e-5 if batches[0].mean() > 1e5 else 1e-9
    assert_promises(last(norm(), batches), of_pooled(batches), rel=rounding)


@pytest.mark.parametrize("single", [False, True])
def test_the_errors_of_averages(single: bool) -> None:
    batches = drifting(UNEVEN)
    alone = [batches[0][:1, :, :1, :1]] if single else []
    point = last(norm(), [*alone, *batches], method="average")
    assert_promises(point, of_average(batches, [1] * len(batches)))


def test_the_errors_of_what_is_normalized_sample_by_sample() -> None:
    batches = drifting(UNEVEN)
    single = nn.InstanceNorm2d(3, track_running_stats=True).double()
    # What it keeps of a batch is the average over the samples of their means and variances.
    means = [batch.mean((2, 3)).mean(0) for batch in batches]
    variances = [batch.flatten(2).var(2).mean(0) for batch in batches]
    # Two values with that mean and variance stand for the batch.
    half = [(v / 2).sqrt() for v in variances]
    stand_ins = [torch.stack([m - h, m + h]) for m, h in zip(means, half, strict=True)]
    assert_promises(last(single, batches), of_average(stand_ins, UNEVEN))


def test_calls_in_one_forward_are_not_independent() -> None:
    """The same batch twice tells no more than once."""
    shared = norm()
    twice = lambda model, batch: (model(batch), model(batch))  # noqa: E731
    batches = drifting(UNEVEN)
    assert_promises(last(shared, batches, forward=twice), of_pooled(batches))


def test_the_norm_known_least_is_named() -> None:
    model = nn.ModuleDict({"quiet": norm(), "loud": norm()})

    def forward(model: nn.Module, x: Tensor) -> None:
        model["quiet"](x)
        model["loud"](x * x.mean().exp())

    batches = drifting(UNEVEN)
    point = last(model, batches, forward=forward)
    assert point.worst == "loud"
    quiet = of_pooled(batches)
    loud = of_pooled([x * x.mean().exp() for x in batches])
    assert point.mean_error == pytest.approx(max(rms(quiet[0]), rms(loud[0])))
    assert point.var_error == pytest.approx(max(rms(quiet[1]), rms(loud[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, -7.3, 1e6])
def test_a_constant_channel_is_known_at_once(level: float, dtype: torch.dtype) -> None:
    batches = drifting(UNEVEN)
    others = of_pooled([batch[:, 1:] for batch in batches])
    for batch in batches:
        batch[:, 0] = level
    rows = [batch.transpose(0, 1).flatten(1).T.contiguous() for batch in batches]
    rounding = 1e-5 if dtype is torch.float32 else 1e-9
    for model, data in ((norm(), batches), (nn.BatchNorm1d(3), rows)):
        point = last(model.to(dtype), [batch.to(dtype) for batch in data])
        # Root mean square over three channels, of which one is known.
        assert point.mean_error == pytest.approx(rms(others[0]) * math.sqrt(2 / 3), rel=rounding)
        assert point.var_error == pytest.approx(rms(others[1]) * math.sqrt(2 / 3), rel=rounding)


def draws(seed: int, *, moving: bool) -> Iterator[Tensor]:
    """Batches of different sizes, without end, with mean 0 and variance 1 or 2 in the long run."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        size = int(torch.randint(4, 33, (), generator=generator))
        batch = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        yield batch + torch.randn(4, generator=generator, dtype=torch.float64) * moving


@pytest.mark.parametrize("moving", [False, True])
def test_the_error_that_is_promised_is_the_error_that_is_found(moving: bool) -> None:
    tol, seeds, var = 0.15, 100, 1.0 + moving
    found_mean, found_var, promised_mean, promised_var = [], [], [], []
    for seed in range(seeds):
        model = nn.BatchNorm1d(4).double()
        report = normswap.warmup(model, draws(seed, moving=moving), tol=tol, batches=3000)
        assert report.samples_needed == report.samples
        point = report.convergence[-1]
        assert point.error <= tol
        found_mean.append(rms(model.running_mean) / math.sqrt(var))
        found_var.append(rms(model.running_var / var - 1))
        promised_mean.append(point.mean_error)
        promised_var.append(point.var_error)
    for found, promised in ((found_mean, promised_mean), (found_var, promised_var)):
        found_all, promised_all = torch.tensor(found), torch.tensor(promised)
        assert (found_all <= 3 * promised_all).double().mean() >= 0.99
        assert (found_all <= 3 * tol).double().mean() >= 0.99
        assert 0.85 < rms(found_all) / rms(promised_all) < 1.15


def test_easy_data_end_early() -> None:
    easy = [values(64, 3, 4, 4, seed=seed) for seed in range(40)]
    report = normswap.warmup(norm(), easy, tol=0.01)
    assert 8 <= report.batches < 40
    assert report.samples_needed == report.samples == 64 * report.batches
    assert report.convergence[-1].error <= 0.01 < report.convergence[-2].error
    expected = norm()
    normswap.warmup(expected, easy[: report.batches])
    again = norm()
    normswap.warmup(again, easy, tol=0.01)
    assert torch.equal(again.running_mean, expected.running_mean)


def test_a_tolerance_that_is_too_strict_reads_everything() -> None:
    report = normswap.warmup(norm(), drifting(UNEVEN), tol=1e-6)
    assert report.batches == len(UNEVEN)
    assert report.samples_needed is None


def test_every_norm_has_to_be_known() -> None:
    """A norm that is reached late holds the others up."""
    model = nn.ModuleList([one_norm(), one_norm()])
    data = cut(images(160), [4] * 40)
    late = iter(range(40))

    def forward(model: nn.Module, x: Tensor) -> None:
        model[0](x)
        if next(late) >= 20:
            model[1](x)

    report = normswap.warmup(model, data, tol=1e9, forward=forward)
    # Until it is reached nothing is known of there being another.
    assert report.batches == 8
    late = iter(range(19, 40))
    assert normswap.warmup(model, data, tol=1e9, forward=forward).batches == 9


@pytest.mark.parametrize(("sizes", "batches"), [([4] * 20, 8), ([100, *[4] * 40], None)])
def test_few_batches_in_effect_are_not_judged(sizes: list[int], batches: int | None) -> None:
    report = normswap.warmup(norm(), drifting(sizes), tol=1e9)
    first = next(n for n in range(1, 99) if n == len(sizes) or effective(sizes[:n]) >= 8)
    assert report.batches == first
    if batches is None:
        assert effective(sizes) < 8
        assert report.samples_needed is None
    else:
        assert first == batches


def test_points_rise_in_samples_and_end_where_the_data_end() -> None:
    batches = [values(2, 3, 2, 2, seed=seed) for seed in range(70)]
    for options, samples in (
        ({}, [16, 32, 64, 128, 140]),
        ({"tol": 1e-9}, list(range(16, 141, 2))),
        ({"batches": 16}, [16, 32]),
    ):
        report = normswap.warmup(norm(), batches, **options)
        assert [point.samples for point in report.convergence] == samples


def test_batches_that_are_left_out_are_no_points() -> None:
    batches = [values(2, 3, 2, 2, seed=seed) for seed in range(20)]
    for index in (3, 12, 19):
        batches[index] *= float("nan")
    report = normswap.warmup(norm(), batches, tol=1e-9, on_nonfinite="skip")
    assert [point.samples for point in report.convergence] == list(range(16, 35, 2))


@pytest.mark.parametrize("method", ["ema", "population"])
def test_methods_that_cannot_stop_refuse_it(method: str) -> None:
    with pytest.raises(OptionError, match=f"tol=.*{method}|{method}.*tol="):
        normswap.warmup(net(), [images(6)], method=method, tol=0.1)
    batches = cut(images(60), [3] * 20)
    assert normswap.warmup(net(), batches, method=method).convergence == ()


@pytest.mark.parametrize("tol", [0, -0.1, float("nan")])
def test_what_is_no_tolerance_is_refused(tol: float) -> None:
    with pytest.raises(OptionError, match="tol="):
        normswap.warmup(net(), [images(6)], tol=tol)
