"""The file for what memory has no room for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normswap.stats.overflow import Overflow
from tests.reference.leftovers import files_made


def noise(size: int, seed: int = 0) -> Tensor:
    """Bytes of all values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 7, 4096, 3_000_001])
def test_bytes_come_back_and_memory_is_given_back_meanwhile(size: int) -> None:
    overflow, tensor = Overflow(), noise(size)
    storage = tensor.untyped_storage()
    offset = overflow.put(storage)
    assert storage.nbytes() == 0
    overflow.take(storage, offset, size)
    assert torch.equal(tensor, noise(size))
    overflow.close()


@pytest.mark.parametrize("seed", range(3))
def test_space_is_used_again_and_none_is_given_twice(seed: int) -> None:
    """Bytes that are put, taken back and dropped at random."""
    chance, overflow = random.Random(seed), Overflow()
    away: dict[int, tuple[Tensor, int, int]] = {}
    most = held = 0
    with files_made() as files:
        for step in range(600):
            if away and chance.random() < 0.5:
                number = chance.choice(list(away))
                tensor, offset, size = away.pop(number)
                held -= size
                if chance.random() < 0.3:
                    overflow.drop(offset, size)
                else:
                    overflow.take(tensor.untyped_storage(), offset, size)
                    assert torch.equal(tensor, noise(size, number))
            else:
                size = chance.choice([16, 16, 16, 48])
                tensor = noise(size, step)
                away[step] = tensor, overflow.put(tensor.untyped_storage()), size
                held += size
                most = max(most, held)
        for number, (tensor, offset, size) in away.items():
            overflow.take(tensor.untyped_storage(), offset, size)
            assert torch.equal(tensor, noise(size, number))
        # First fit of sizes up to n times apart wastes at most a factor that grows as log n
        # (Robson 1974); without using space again it would be all that was ever put.
        assert os.fstat(files[0].fileno()).st_size <= 2 * most
        overflow.put(noise(10**5).untyped_storage())
        assert os.fstat(files[0].fileno()).st_size <= 2 * most + 10**5
        overflow.close()


def test_space_that_is_free_on_both_sides_becomes_one() -> None:
    overflow = Overflow()
    offsets = [overflow.put(noise(8).untyped_storage()) for _ in range(3)]
    for offset in (offsets[0], offsets[2], offsets[1]):
        overflow.drop(offset, 8)
    assert overflow.put(noise(24).untyped_storage()) == 0
    overflow.close()


def test_the_file_has_no_name_and_is_gone_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    overflow = Overflow()
    with files_made() as files:
        assert not files
        overflow.put(noise(100).untyped_storage())
        assert list(tmp_path.iterdir()) == []
        overflow.close()
        overflow.close()
    assert [file.closed for file in files] == [True]


def test_it_can_be_used_again_when_it_was_closed() -> None:
    overflow, tensor = Overflow(), noise(50)
    overflow.put(noise(100).untyped_storage())
    overflow.close()
    offset = overflow.put(tensor.untyped_storage())
    overflow.take(tensor.untyped_storage(), offset, 50)
    assert torch.equal(tensor, noise(50))
    overflow.close()


DYING = """
import os, signal
from tests.stats.test_overflow import Overflow, noise
overflow = Overflow()
overflow.put(noise(100_000).untyped_storage())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_is_gone_when_the_process_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", DYING], env=environment, check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []


class Disk:
    """A file on a disk that is full after some bytes, and that writes and reads few at once."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room
        self.seek, self.close = file.seek, file.close

    def write(self, data: memoryview) -> int:
        written = int(self.file.write(data[: min(1000, self.room)]))
        self.room -= written
        if not written:
            raise OSError("No space left on device")
        return written

    def readinto(self, data: memoryview) -> int:
        return int(self.file.readinto(data[:700]))


def test_a_file_that_takes_and_gives_few_bytes_at_once() -> None:
    overflow, tensor = Overflow(), noise(10_000)
    vars(overflow)["_file"] = Disk(overflow._file, room=10_000)
    offset = overflow.put(tensor.untyped_storage())
    overflow.take(tensor.untyped_storage(), offset, 10_000)
    assert torch.equal(tensor, noise(10_000))
    overflow.close()


def test_a_full_disk_leaves_the_bytes_in_memory() -> None:
    overflow, tensor = Overflow(), noise(10_000)
    vars(overflow)["_file"] = Disk(overflow._file, room=5000)
    with pytest.raises(OSError, match="No space left"):
        overflow.put(tensor.untyped_storage())
    assert torch.equal(tensor, noise(10_000))
    overflow.close()


def test_a_file_that_was_cut_off_is_told() -> None:
    overflow, tensor = Overflow(), noise(10_000)
    offset = overflow.put(tensor.untyped_storage())
    os.ftruncate(overflow._file.fileno(), 5000)
    with pytest.raises(OSError, match="cut off"):
        overflow.take(tensor.untyped_storage(), offset, 10_000)
    overflow.close()
