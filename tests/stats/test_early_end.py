"""A forward need not go on after its last norm, and the statistics do not show that it did not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normswap
from tests.reference import formulas
from tests.stats.models import assert_keeps_all_of, cut, images, one_norm


class Head(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def normalized(x: Tensor) -> Tensor:
    """What a norm without affine makes of a batch."""
    return formulas.batch_norm(x, torch.ones(2).double(), torch.zeros(2).double())


class TwoNorms(nn.Module):
    """Calls its norms as the sign of the data's first number says."""

    def __init__(self, *, positive: str, negative: str) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(2).double()
        self.b = nn.BatchNorm2d(2).double()
        self.ways = {True: positive, False: negative}

    def forward(self, x: Tensor) -> Tensor:
        for name in self.ways[bool(x.flatten()[0] > 0)]:
            x = getattr(self, name)(x) + 1
        return x

    def inputs(self, batches: list[Tensor]) -> dict[str, Tensor]:
        """All that each norm is to see."""
        seen: dict[str, list[Tensor]] = {"a": [], "b": []}
        for x in batches:
            for name in self.ways[bool(x.flatten()[0] > 0)]:
                seen[name].append(x)
                x = normalized(x) + 1
        return {name: torch.cat(parts) for name, parts in seen.items()}


def positive_and_negative() -> list[Tensor]:
    data = images(4).abs() + 0.1
    return [data, -2 * data, 3 * data]


def check(positive: str, negative: str) -> None:
    model, data = TwoNorms(positive=positive, negative=negative), positive_and_negative()
    normswap.warmup(model, data)
    for name, inputs in model.inputs(data).items():
        assert_keeps_all_of(getattr(model, name), inputs)


def test_what_comes_after_the_last_norm_is_spared() -> None:
    head = Head()
    model = one_norm().append(head)
    normswap.warmup(model, cut(images(20), [4] * 5))
    assert head.calls < 5


def test_the_statistics_are_those_of_whole_forwards() -> None:
    model = one_norm().append(Head())
    normswap.warmup(model, cut(images(20), [4] * 5))
    assert_keeps_all_of(model[1], model[0](images(20)))


def test_the_model_works_as_before_afterwards() -> None:
    head = Head()
    model = one_norm().append(head)
    normswap.warmup(model, cut(images(8), [4, 4]))
    calls = head.calls
    model(images(4))
    assert head.calls == calls + 1


def test_a_model_that_catches_exceptions_does_not_catch_the_end() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2).double()
            self.mishaps = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.norm(x)
            except Exception:
                self.mishaps += 1
                return x

    model = Careful()
    normswap.warmup(model, cut(images(9), [3] * 3))
    assert model.mishaps == 0


def test_both_norms_at_every_batch() -> None:
    check("ab", "ab")


def test_one_norm_always_twice() -> None:
    check("aba", "aba")


def test_a_norm_that_only_later_batches_reach() -> None:
    check("a", "ab")


def test_a_norm_that_only_the_first_batch_reaches() -> None:
    check("ab", "a")


def test_norms_in_another_order_at_a_later_batch() -> None:
    check("ab", "ba")


def test_a_norm_twice_before_the_last_at_a_later_batch() -> None:
    check("ab", "aab")


def test_a_norm_again_after_the_last_at_a_later_batch() -> None:
    check("ab", "aba")


def test_a_forward_that_calls_the_model_more_often_at_a_later_batch() -> None:
    model, data = one_norm(), cut(images(9), [2, 4, 3])

    def halves(model: nn.Module, batch: Tensor) -> None:
        for half in batch.split(2):
            model(half)

    normswap.warmup(model, data, forward=halves)
    assert_keeps_all_of(model[1], model[0](images(9)))


class Crops(nn.Module):
    """Takes one image, or a list of them, or a second one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2).double()

    def forward(self, x: Tensor | list[Tensor], other: Tensor | None = None) -> None:
        for crop in x if isinstance(x, list) else [x]:
            self.norm(crop)
        if other is not None:
            self.norm(other)


def test_a_list_of_inputs_that_calls_a_norm_for_each() -> None:
    model, data = Crops(), cut(images(8), [3, 5])
    normswap.warmup(model, [(data, None), (data, None)])
    assert_keeps_all_of(model.norm, images(8).repeat(2, 1, 1, 1))


def test_an_argument_by_name_that_calls_a_norm_again() -> None:
    model, (x, other) = Crops(), cut(images(8), [3, 5])
    normswap.warmup(model, [{"x": x, "other": other}] * 2)
    assert_keeps_all_of(model.norm, images(8).repeat(2, 1, 1, 1))
