"""A file that tells how far a pass has got, so that it can go on after it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.errors import OptionError, StatisticsError
from normswap.stats.gathered import Gathered

__all__ = ["Bookmark", "digest", "fingerprint"]

#: Saving may take this share of the time.
SHARE = 0.02
_KEY = "normswap_pass"


class Bookmark:
    """Saves what a pass has seen now and then, in a file that is always whole.

    Args:
        path: the file; ``None`` to save nothing.
        identity: what the pass is about: a file that says otherwise is refused.
        rank: this process's number among several, which each have a file; ``None`` if alone.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any], *, rank: int | None
    ) -> None:
        self._path = None
        if path is not None:
            name = os.fspath(path)
            self._path = Path(name if rank is None else f"{name}.{rank}")
            self._unfinished = Path(f"{self._path}.part")
        self._identity = dict(identity)
        self._cost, self._saved = 0.0, -float("inf")
        self._pages, self._trail = 0, ""
        self._last = (0, "")

    def load(self, gathered: Gathered) -> None:
        """Let ``gathered`` be what was saved, if anything was.

        Raises:
            StatisticsError: the file is of another pass, or no bookmark at all.
            OptionError: no file can be there.
        """
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise OptionError(
                f"resume={str(self._path)!r}: there is no folder {str(self._path.parent)!r}"
            )
        if not self._path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                notes = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise StatisticsError(
                f"resume={str(self._path)!r} is not a bookmark of a statistics pass ({error}); "
                "give another path, or delete the file"
            ) from None
        for what, value in self._identity.items():
            if notes["identity"].get(what) != value:
                raise StatisticsError(
                    f"resume={str(self._path)!r} is of another pass: its {what} differs; go on "
                    "with the same, give another path, or delete the file to start anew"
                )
        gathered.restore(tensors, notes["seen"])
        self._last = (notes["pages"], notes["trail"])

    def turn(self, batch: Any) -> bool:
        """Follow the loader by one batch; return whether the pass that was saved had read it.

        Raises:
            StatisticsError: up to the last page the loader yields other data than then.
        """
        if self._path is None:
            return False
        self._pages += 1
        self._trail = _digest([self._trail, *_told(batch)])
        if self._pages == self._last[0] and self._trail != self._last[1]:
            raise self._other_data()
        return self._pages <= self._last[0]

    def rewind(self) -> None:
        """Say that the loader is read from its start."""
        self._pages, self._trail = 0, ""

    def close(self) -> None:
        """Say that the loader has ended.

        Raises:
            StatisticsError: it had yielded more when the bookmark was saved.
        """
        if self._pages < self._last[0]:
            raise self._other_data()

    def _other_data(self) -> StatisticsError:
        return StatisticsError(
            f"resume={str(self._path)!r} has read {self._last[0]} batches, and the loader does not "
            "yield the same ones again; let it yield the same batches in the same order (no "
            "shuffling, or the same seed), or delete the file to start anew"
        )

    def save(self, gathered: Gathered) -> None:
        """Save, unless the last time is too short ago."""
        if self._path is None:
            return
        started = time.perf_counter()
        if started - self._saved < self._cost / SHARE:
            return
        from safetensors.torch import save_file

        tensors, notes = gathered.state()
        save_file(
            {name: tensor.cpu().clone() for name, tensor in tensors.items()},
            self._unfinished,
            metadata={_KEY: json.dumps(self._notes(notes))},
        )
        os.replace(self._unfinished, self._path)
        self._saved = time.perf_counter()
        self._cost = self._saved - started

    def _notes(self, seen: dict[str, Any]) -> dict[str, Any]:
        return {
            "identity": self._identity,
            "pages": self._pages,
            "trail": self._trail,
            "seen": seen,
        }

    def remove(self) -> None:
        """Delete the file, and what a save that was killed left: the pass is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._unfinished.unlink(missing_ok=True)


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's tensors: names, shapes, and some of the values."""
    return _digest(
        [
            part
            for name, tensor in sorted(model.state_dict(keep_vars=True).items())
            for part in (name, *_told(tensor))
        ]
    )


def digest(batch: Any) -> str:
    """What tells a batch from others: a digest of its shapes and some of its values."""
    return _digest(_told(batch))


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _told(value: Any) -> list[Any]:
    """What tells a value from another: of tensors the shape and some hundred numbers."""
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        if value.is_meta or not value.numel():
            return [shape, str(value.dtype)]
        some = value.detach().reshape(1) if value.ndim == 0 else value.detach()
        some = some[:: -(-len(some) // 16)].flatten()
        return [shape, str(value.dtype), some[:: -(-len(some) // 256)].tolist()]
    if isinstance(value, Mapping):
        return [part for key, each in value.items() for part in (str(key), *_told(each))]
    if isinstance(value, (tuple, list)):
        return [part for each in value for part in _told(each)]
    return [value] if isinstance(value, (str, int, float)) else []
