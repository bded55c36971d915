"""Finding in a backward what the forward was given, where checkpointing computes it once more.

Activation checkpointing runs parts of a forward again while its backward runs: when the call of
the model is over, and perhaps in another thread. A norm that is reached then must see what it saw
before. What tells is the node of autograd that asks for the part: nodes are numbered as they are
made, so the node belongs to the forward that was on its way at its number. Numbers count in each
thread for itself. A forward is only taken for one if this backward came through its outputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normswap.errors import InputError

__all__ = ["Resumable", "in_backward", "refound"]

#: The forwards that each backward under way came through, by the backward's number. Weak, as
#: after an error in a backward nobody takes its entry out.
_UNDER_WAY: dict[int, list[weakref.ref[Resumable]]] = {}


class _Thread(threading.local):
    """What a thread last ran again: the backward's number and the forward."""

    resumed: tuple[int, weakref.ref[Resumable]] | None = None


_HERE = _Thread()


class Resumable:
    """A forward that its backward can find again.

    Its backward holds it alive, so it must not hold the graph.
    """

    def begin(self, tensors: Iterator[Tensor]) -> None:
        """Note when the forward begins, and where its tensors are."""
        self._first = _next_number()
        self._end = self._first
        self._thread = threading.get_ident()
        self._devices = {tensor.device for tensor in tensors}

    def end(self, output: object) -> None:
        """Note when it has ended, and let the backward of its output tell that it is under way."""
        self._end = _next_number()
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        nodes = {tensor.grad_fn for tensor in tensors}
        for node in nodes:
            if node is not None:
                node.register_prehook(partial(_under_way, self))

    def made(self, number: int) -> bool:
        """Whether a node of this number may have been made on the way."""
        return self._first <= number < self._end


def in_backward() -> bool:
    """Whether a backward is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def refound(device: torch.device | None) -> Any:
    """The forward that is being run again in this thread; ``None`` if none is known to be.

    Args:
        device: where the tensor is that a norm is given, which tells replicas apart.

    Raises:
        InputError: it may be any of several that ran in different threads.
    """
    task = torch._C._current_graph_task_id()
    node = torch._C._current_autograd_node()
    if task == -1 or node is None:
        return None
    alive = [forward for held in _UNDER_WAY.get(task, ()) if (forward := held()) is not None]
    number = node._sequence_nr()
    found = [forward for forward in alive if forward.made(number)]
    if len({forward._thread for forward in found}) > 1:
        found = [forward for forward in found if device in forward._devices]
        if len({forward._thread for forward in found}) > 1:
            raise InputError(
                "a norm with extra inputs is run again by activation checkpointing, in one "
                "backward of forwards that ran in several threads, and cannot tell whose inputs "
                "it is to see; call backward for each forward by itself"
            )
    if found:
        innermost = max(found, key=lambda forward: forward._first)
        _HERE.resumed = task, weakref.ref(innermost)
        return innermost
    # What is run again may have checkpoints of its own, with a backward inside this one.
    outer = _HERE.resumed
    if outer is not None and outer[0] != task and outer[0] in _UNDER_WAY:
        return outer[1]()
    return None


def _under_way(forward: Resumable, gradients: object) -> None:
    """Note that the backward at hand came through a forward's output, until it is over."""
    task = torch._C._current_graph_task_id()
    if task not in _UNDER_WAY:
        over = partial(_over, task)
        torch.autograd.Variable._execution_engine.queue_callback(over)
    _UNDER_WAY.setdefault(task, []).append(weakref.ref(forward))


def _over(task: int) -> None:
    """Forget a backward that is over."""
    _UNDER_WAY.pop(task, None)


def _next_number() -> int:
    """The number of the node that autograd makes next in this thread."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number
