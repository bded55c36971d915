"""Functions that stop on their way and go on later, however deep in their calls they stop.

A pass that needs every batch at a norm before any goes on runs one forward a batch, and lets each
stop there. What a stopped forward still needs is what its own frames hold: no graph of the model
is needed, and Python frees what no later operation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch.overrides import (  # type: ignore[attr-defined]
    _len_torch_function_stack,
    _pop_mode,
    _push_mode,
)

from normswap.errors import StatisticsError
from normswap.norms.inputs.call import Call, on_its_way, swapped

__all__ = ["Strand", "stop"]


class Strand:
    """One run of a function, from stop to stop.

    Context variables are as where the strand is made, and what the function sets is its own.

    Args:
        run: what runs; somewhere inside it calls `stop`.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = _Run(run)
        self._run.gr_context = copy_context()

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
        """End the function where it stands; its ``finally`` blocks run, and cannot stop again."""
        if self._run:
            self._run.parent = getcurrent()
            self._run.given_up = True
            self._run.throw()


def stop(reason: object) -> Any:
    """Stop the strand that this is called in, until it is advanced again.

    Args:
        reason: what `Strand.advance` returns.

    Returns:
        What `Strand.advance` is given next.

    Raises:
        StatisticsError: this is called in no strand, such as in another thread.
    """
    run = getcurrent()
    if not isinstance(run, _Run) or run.parent is None:
        raise StatisticsError(
            "a norm was called outside of the forward that was to be run, such as in a thread "
            "that the forward has started, where it cannot wait for the other batches; "
            'use method="pooled", which needs no waiting'
        )
    if run.given_up:
        raise GreenletExit
    with run.outside.restored():
        return run.parent.switch(reason)


class _Run(greenlet):
    """A greenlet that knows what it was last advanced under."""

    outside: _Ambient
    given_up = False


@dataclass(frozen=True)
class _Ambient:
    """What belongs to a thread, which all strands share: torch's modes, and a model's inputs."""

    grad: bool
    inference: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    function_modes: int
    call: Call | None

    @classmethod
    def now(cls) -> _Ambient:
        autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda", "mps", "xpu")
        }
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocast,
            _len_torch_function_stack(),
            on_its_way(),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What a strand has set for itself does not hold for others while it is stopped."""
        inside = _Ambient.now()
        if inside == self:
            yield
            return
        with ExitStack() as modes:
            if inside.inference != self.inference:
                modes.enter_context(torch.inference_mode(self.inference))
            for _ in range(inside.function_modes - self.function_modes):
                modes.callback(_push_mode, _pop_mode())  # type: ignore[no-untyped-call]
            modes.callback(inside._set)
            self._set()
            yield

    def _set(self) -> None:
        swapped(self.call)
        torch.set_grad_enabled(self.grad)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
