"""A warm-up writes running statistics and nothing else; one that fails writes nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NormSwapError, OptionError, StatisticsError
from tests.reference.footprint import footprint, random_states
from tests.stats.failing import draw, mixed
from tests.stats.models import CHANNELS, cut, images, net

NUMBERS = ("running_mean", "running_var", "num_batches_tracked")


class Failing(nn.Module):
    """Raises at its second call, after drawing random numbers."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        draw()
        self.calls[0] += 1
        if self.calls[0] == 2:
            raise self.error("on purpose")
        return x


def failing_loader(error: type[BaseException]) -> Iterator[Tensor]:
    for _ in range(2):
        draw()
        yield images(4)
    raise error("on purpose")


def spoilt() -> list[Tensor]:
    """Batches of which the second holds a value that is not finite."""
    batches = cut(images(12), [4, 4, 4])
    batches[1][0, 0, 0, 0] = float("nan")
    return batches


def run(loader: Any = (), **arguments: Any) -> Callable[[nn.Sequential], object]:
    return lambda model: normswap.warmup(
        model, loader() if callable(loader) else loader, **arguments
    )


def run_with(layer: Callable[[], nn.Module]) -> Callable[[nn.Sequential], object]:
    def act(model: nn.Sequential) -> None:
        normswap.warmup(nn.Sequential(model[:5], layer(), model[5:]), [images(4)] * 3)

    return act


FAILURES: dict[str, tuple[Callable[[nn.Sequential], object], type[BaseException]]] = {
    "an empty loader": (run([]), StatisticsError),
    "no batches": (run([images(4)], batches=0), OptionError),
    "no samples": (run([images(4)], samples=0), OptionError),
    "an unknown method": (run([images(4)], method="mean"), OptionError),
    "an unknown policy": (run([images(4)], on_nonfinite="ignore"), OptionError),
    "a selector of nothing": (run([images(4)], where="layer1"), NormSwapError),
    "a forward that does nothing": (run([images(4)], forward=lambda m, x: None), StatisticsError),
    "keys that nothing takes": (run([{"pixels": images(4)}]), OptionError),
    "values that are not finite": (run(spoilt), StatisticsError),
    "nothing but such values": (run([spoilt()[1]], on_nonfinite="skip"), StatisticsError),
    "a single value": (run([images(1)[..., :1, :1]]), StatisticsError),
    "an error in the loader": (run(lambda: failing_loader(LookupError)), LookupError),
    "an interrupt in the loader": (
        run(lambda: failing_loader(KeyboardInterrupt)),
        KeyboardInterrupt,
    ),
    "an error in the model": (run_with(lambda: Failing(LookupError)), LookupError),
    "an interrupt in the model": (run_with(lambda: Failing(KeyboardInterrupt)), KeyboardInterrupt),
    "an input of another size": (run([images(4), images(4)[:, :1]]), RuntimeError),
}
each_failure = pytest.mark.parametrize(("fail", "error"), FAILURES.values(), ids=FAILURES.keys())


@each_failure
def test_a_failure_leaves_the_model_as_it_was(
    fail: Callable[[nn.Sequential], object], error: type[BaseException]
) -> None:
    model = mixed()
    before = footprint(model)
    with pytest.raises(error):
        fail(model)
    assert footprint(model) == before


@each_failure
def test_a_failure_leaves_the_random_states_as_they_were(
    fail: Callable[[nn.Sequential], object], error: type[BaseException]
) -> None:
    model, before = mixed(), random_states()
    with pytest.raises(error):
        fail(model)
    assert random_states() == before


def test_a_model_that_failed_can_be_warmed_up() -> None:
    model, other = mixed(), mixed()
    with pytest.raises(LookupError):
        normswap.warmup(model, failing_loader(LookupError))
    for each in (model, other):
        normswap.warmup(each, cut(images(8), [4, 4]))
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_an_error_while_writing_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last buffer cannot be written: those before it are put back."""
    model = mixed()
    before, copy = footprint(model), Tensor.copy_
    last = model[5].num_batches_tracked

    def failing(self: Tensor, *args: Any) -> Tensor:
        if self is last and args[0] == 2:
            raise LookupError("on purpose")
        return copy(self, *args)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(LookupError):
        normswap.warmup(model, cut(images(8), [4, 4]))
    monkeypatch.undo()
    assert footprint(model) == before


@pytest.mark.parametrize("method", ["pooled", "average", "ema"])
@pytest.mark.parametrize("training", [True, False])
def test_a_success_changes_nothing_but_running_statistics(method: str, training: bool) -> None:
    model = mixed().train(training)
    before = footprint(model)
    report = normswap.warmup(model, cut(images(8), [4, 4]), method=method)
    assert len(report.estimated) == 2
    after = footprint(model)
    assert {key for key in before if after[key] != before[key]} == {"1._buffers", "5._buffers"}
    assert list(after) == list(before)


def test_running_statistics_are_written_in_place() -> None:
    model = mixed()
    before = [
        (norm.get_buffer(n), norm.get_buffer(n).data_ptr())
        for norm in (model[1], model[5])
        for n in NUMBERS
    ]
    normswap.warmup(model, cut(images(8), [4, 4]))
    after = [norm.get_buffer(n) for norm in (model[1], model[5]) for n in NUMBERS]
    for (tensor, place), now in zip(before, after, strict=True):
        assert now is tensor
        assert now.data_ptr() == place


def test_a_success_leaves_the_random_states_as_they_were() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            draw()
            return x

    model, before = mixed().insert(0, Random()), random_states()
    normswap.warmup(model, cut(images(8), [4, 4]))
    assert random_states() == before


def test_gradients_that_were_there_stay() -> None:
    model = net()
    model(images(4)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    normswap.warmup(model, cut(images(8), [4, 4]))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_values_that_are_not_finite_are_blamed_on_norm_and_batch() -> None:
    with pytest.raises(StatisticsError, match=r"1 \(BatchNorm2d\).*not finite in batch 1"):
        normswap.warmup(net(), spoilt())


def test_values_that_become_infinite_on_the_way_are_blamed_on_their_norm() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.fill_(float("inf"))
    with pytest.raises(StatisticsError, match=r"5 \(BatchNorm2d\).*batch 0"):
        normswap.warmup(model, [images(4)])


def test_batches_that_are_not_finite_can_be_skipped_and_are_counted() -> None:
    model, expected, batches = net(), net(), spoilt()
    report = normswap.warmup(model, batches, on_nonfinite="skip")
    normswap.warmup(expected, [batches[0], batches[2]])
    assert (report.batches, report.skipped, report.samples) == (2, 1, 8)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_first_batch_that_is_skipped_does_not_spoil_the_others() -> None:
    model, expected, batches = net(), net(), spoilt()
    normswap.warmup(model, [batches[1], batches[0], batches[2]], on_nonfinite="skip")
    normswap.warmup(expected, [batches[0], batches[2]])
    assert torch.equal(model[5].running_var, expected[5].running_var)
    assert model[1].running_mean.shape == (CHANNELS,)
