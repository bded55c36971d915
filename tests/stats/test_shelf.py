"""Keeping what others made while they wait: in memory up to a budget, in a file past it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from normswap.stats.shelf import Holder, Shelf
from tests.reference.data import values
from tests.reference.leftovers import files_made


def working(shelf: Shelf, holder: Holder, work: Callable[[], Any]) -> Any:
    """Let somebody work, and wait again."""
    with shelf.working(holder):
        return holder.making(work)()


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor's bytes are not in memory."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def test_what_has_no_room_goes_to_the_file_and_comes_back() -> None:
    shelf = Shelf(100)
    holder = shelf.holder()
    with files_made() as files:
        small, large = working(shelf, holder, lambda: (torch.ones(10), torch.arange(100.0) + 1))
        assert (is_away(small), is_away(large)) == (False, True)
        assert (shelf.resting, shelf.most, shelf.spilled) == (40, 40, 400)
        assert working(shelf, holder, large.tolist) == [float(i) for i in range(1, 101)]
        shelf.clear()
    assert torch.equal(large, torch.arange(100.0) + 1)
    assert shelf.resting == 0
    assert [file.closed for file in files] == [True]


def test_what_has_room_makes_no_file() -> None:
    shelf = Shelf(1000)
    with files_made() as files:
        working(shelf, shelf.holder(), lambda: torch.ones(250))
        shelf.clear()
    assert (files, shelf.spilled, shelf.most) == ([], 0, 1000)


def test_what_was_freed_takes_no_room() -> None:
    shelf = Shelf(400)
    holder = shelf.holder()
    working(shelf, holder, lambda: sum(torch.ones(100) for _ in range(10)))
    kept = working(shelf, holder, lambda: torch.ones(100))
    assert not is_away(kept)
    assert (shelf.resting, shelf.spilled) == (400, 0)


MADE: dict[str, Callable[[], Tensor]] = {
    "double": lambda: values(7),
    "half": lambda: values(7).half(),
    "bfloat16": lambda: values(7).bfloat16(),
    "complex": lambda: torch.complex(values(7), values(7, seed=1)),
    "bool": lambda: values(7) > 0,
    "integers": lambda: torch.arange(7),
    "no dimension": lambda: values(1).sum(),
    "not a number": lambda: torch.full((7,), float("nan")) * 1,
    "channels last": lambda: (values(2, 3, 4, 5) + 0).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: (values(3, 4) + 0).t(),
    "a part": lambda: (values(10, 10) + 0)[2:8:3, 1::2],
    "expanded": lambda: (values(3, 1) + 0).expand(3, 5),
    "a parameter": lambda: torch.nn.Parameter(values(7) + 0),
    "empty": lambda: values(0) + 0,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_tensors_of_all_kinds_stay_what_they_are(make: Callable[[], Tensor]) -> None:
    shelf, expected = Shelf(0), make()
    holder = shelf.holder()
    tensor = working(shelf, holder, make)
    assert is_away(tensor) or not tensor.numel()
    for _ in range(3):
        working(shelf, holder, lambda: None)
    shelf.clear()
    assert torch.equal(_bytes(tensor), _bytes(expected))
    assert (tensor.stride(), tensor.storage_offset()) == (
        expected.stride(),
        expected.storage_offset(),
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_views_and_operations_in_place_keep_their_aliases() -> None:
    shelf = Shelf(0)
    holder = shelf.holder()

    def make() -> tuple[Tensor, ...]:
        base = torch.zeros(4, 6)
        return base, base[1], base.t()[2:4], base.detach(), base.view(-1)[::5]

    base, row, columns, twin, steps = working(shelf, holder, make)
    expected = make()
    with shelf.working(holder):
        made = (base, row, columns, twin, steps)
        for tensors in (made, expected):
            tensors[1].add_(1)
            tensors[2].mul_(3).sub_(0.5)
            tensors[4].copy_(torch.arange(5.0))
    assert all(map(is_away, made))
    with shelf.working(holder):
        for tensors in (made, expected):
            tensors[0].relu_()
    shelf.clear()
    assert all(map(torch.equal, made, expected))
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 1


def test_others_may_read_and_write_what_one_has_left_somewhere() -> None:
    shelf = Shelf(0)
    one, other = shelf.holder(), shelf.holder()
    left = working(shelf, one, lambda: values(7) + 1)
    assert is_away(left)
    assert working(shelf, other, left.tolist) == (values(7) + 1).tolist()
    working(shelf, other, lambda: left.add_(1))
    assert working(shelf, one, left.tolist) == (values(7) + 1 + 1).tolist()
    shelf.clear()


def test_what_others_have_read_is_put_aside_again() -> None:
    shelf = Shelf(0)
    everybody = [shelf.holder() for _ in range(3)]
    left = [working(shelf, each, lambda: values(7) + 1) for each in everybody]
    reader = shelf.holder()
    working(shelf, reader, lambda: torch.stack(left))
    assert all(map(is_away, left))
    assert shelf.resting == 0
    shelf.clear()


def test_memory_that_was_handed_out_stays_where_it_is() -> None:
    shelf = Shelf(0)
    holder = shelf.holder()

    def make() -> tuple[Any, Tensor, Tensor]:
        first, second, third = (torch.arange(5.0) for _ in range(3))
        return first.numpy(), torch.from_dlpack(second), third

    array, twin, third = working(shelf, holder, make)
    assert is_away(third)
    assert array.tolist() == twin.tolist() == [0, 1, 2, 3, 4]
    shelf.clear()


def test_what_was_there_before_stays_where_it_is() -> None:
    shelf, weight = Shelf(0), values(7)
    working(shelf, shelf.holder(), lambda: (weight.add_(1), weight[2:], weight.detach()))
    assert torch.equal(weight, values(7) + 1)
    assert (shelf.spilled, shelf.resting) == (0, 0)


class Shadow:
    """Somebody who does random things, and keeps equal tensors that no shelf knows."""

    def __init__(self, shelf: Shelf, chance: random.Random) -> None:
        self.shelf, self.chance = shelf, chance
        self.holder = shelf.holder()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def work(self, read: list[tuple[Tensor, Tensor]]) -> None:
        """Read what another has made; make, change and free some tensors.

        All are to be as their shadows.
        """
        with self.shelf.working(self.holder):
            for _ in range(self.chance.randint(0, 3)):
                seed, size = self.chance.random(), self.chance.choice([1, 3, 50, 200])
                pair = [self._step(each, seed, size) for each in (self._in_watch, _outside)]
                self.pairs.append((pair[0], pair[1]))
            self.pairs = [pair for pair in self.pairs if self.chance.random() < 0.8]
            for real, shadow in self.pairs + read[:3]:
                assert self.holder.making(partial(torch.equal, real, shadow))()

    def resident(self) -> int:
        """Bytes that they hold in memory: by the tensors themselves, not by any account."""
        storages = [real.untyped_storage() for real, _ in self.pairs]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def _in_watch(self, work: Callable[[], Tensor]) -> Tensor:
        made: Tensor = self.holder.making(work)()
        return made

    def _step(
        self, run: Callable[[Callable[[], Tensor]], Tensor], seed: float, size: int
    ) -> Tensor:
        chance, column = random.Random(seed), run is _outside
        known = [pair[column] for pair in self.pairs]
        if not known or chance.random() < 0.5:
            return run(lambda: torch.full((size,), chance.random()).cumsum(0))
        tensor = chance.choice(known)
        if chance.random() < 0.5:
            return run(lambda: tensor.mul_(chance.random()))
        return run(lambda: tensor[len(tensor) // 2 :])


def _outside(work: Callable[[], Tensor]) -> Tensor:
    return work()


@pytest.mark.parametrize("budget", [0, 500, 5000, sys.maxsize])
@pytest.mark.parametrize("seed", range(4))
def test_random_work_stays_within_the_budget_and_is_as_without(seed: int, budget: int) -> None:
    chance, shelf = random.Random(seed), Shelf(budget)
    everybody = [Shadow(shelf, chance) for _ in range(6)]
    with files_made() as files:
        for _ in range(120):
            chance.choice(everybody).work(read=chance.choice(everybody).pairs)
            assert sum(each.resident() for each in everybody) <= shelf.resting <= budget
        assert bool(shelf.spilled) == (budget < sys.maxsize)
        assert shelf.most <= budget
        shelf.clear()
    for each in everybody:
        assert all(torch.equal(real, shadow) for real, shadow in each.pairs)
    assert all(file.closed for file in files)
    assert not shelf._away
