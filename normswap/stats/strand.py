"""Functions that stop on their way and go on later, however deep in their calls they stop.

A pass that needs every batch at a norm before any goes on runs one forward a batch, and lets each
stop there. What a stopped forward still needs is what its own frames hold: no graph of the model
is needed, and Python frees what no later operation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

__all__ = ["Strand", "stop"]


class Strand:
    """One run of a function, from stop to stop.

    Args:
        run: what runs; somewhere inside it calls `stop`.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = _Run(run)

    @property
    def ended(self) -> bool:
        """Whether the function has returned, or was given up."""
        return bool(self._run.dead)

    def advance(self, answer: object = None) -> Any:
        """Run on to the next stop, or to the end.

        Args:
            answer: what `stop` returns inside the function.

        Returns:
            What `stop` was called with, or what the function returned.

        Raises:
            Exception: whatever the function raises.
        """
        self._run.parent = getcurrent()
        self._run.outside = _Ambient.now()
        return self._run.switch(answer) if self._run else self._run.switch()

    def give_up(self) -> None:
        """End the function where it stands; its ``finally`` blocks run."""
        if self._run:
            self._run.parent = getcurrent()
            self._run.throw()


def stop(reason: object) -> Any:
    """Stop the strand that this is called in, until it is advanced again.

    Args:
        reason: what `Strand.advance` returns.

    Returns:
        What `Strand.advance` is given next.
    """
    run: Any = getcurrent()
    with run.outside.restored():
        return run.parent.switch(reason)


@dataclass(frozen=True)
class _Ambient:
    """The modes of torch that belong to a thread, which all strands share."""

    grad: bool
    inference: bool
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls) -> _Ambient:
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
        }
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What a strand has set for itself does not hold for others while it is stopped."""
        inside = _Ambient.now()
        with ExitStack() as modes:
            if inside.inference != self.inference:
                modes.enter_context(torch.inference_mode(self.inference))
            if torch.is_grad_enabled() != self.grad:
                modes.enter_context(torch.set_grad_enabled(self.grad))
            for kind, (enabled, dtype) in self.autocast.items():
                if inside.autocast[kind] != (enabled, dtype):
                    modes.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class _Run(greenlet):
    """A greenlet that knows what it was last advanced under."""

    outside: _Ambient
