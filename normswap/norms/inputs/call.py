"""The call of a model that is on its way, with the extra inputs that its norms are to see.

They are the thread's, so that two threads may run two batches through one model. A plain
attribute of the thread is also what `torch.compile` can follow, where it stops at a context
variable. Whatever a norm makes of them is made once in a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from normswap.errors import InputError
from normswap.norms.inputs.backward import Resumable, in_backward, refound
from normswap.norms.inputs.kinds import ExtraInput, is_looked_at

__all__ = ["Call", "current", "entered", "for_norm", "giving", "on_its_way", "swapped"]

_HERE = threading.local()


class Call(Resumable):
    """The extra inputs of one call of a model.

    Args:
        values: by name what was given, or the default.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self._made: dict[Hashable, Any] = {}

    def once(self, key: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made at the first request only.

        What was made without a graph is made again where a graph is kept.
        """
        key = (*key, torch.is_grad_enabled())
        if key not in self._made:
            self._made[key] = make()
        made: Tensor = self._made[key]
        return made


def current(device: torch.device | None = None) -> Call | None:
    """The call on its way in this thread, or being run again by its backward.

    Args:
        device: where the tensor is that a norm is given.
    """
    call = on_its_way()
    if call is None and not is_looked_at():
        call = refound(device)
    return call


def on_its_way() -> Call | None:
    """The call on its way in this thread."""
    call: Call | None = getattr(_HERE, "call", None)
    return call


def swapped(call: Call | None) -> Call | None:
    """Let another call be the one on its way in this thread; returns the one that was."""
    before = on_its_way()
    _HERE.call = call
    return before


def entered(
    function: Callable[..., Any],
    inputs: Sequence[ExtraInput],
    own: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a forward, with the extra inputs among its arguments for the norms inside.

    A forward that is called in another one's call sees that one's inputs, where it is given none
    of its own.

    Args:
        function: the forward.
        inputs: the extra inputs that norms in it take.
        own: the extra inputs that are parameters of the forward as well, with their positions.
        args: positional arguments.
        kwargs: keyword arguments; those that the forward does not have are taken out.

    Raises:
        InputError: an input is missing or does not fit; nothing has run.
    """
    given = _taken_out(inputs, own, args, kwargs)
    if any(isinstance(arg, Proxy) for arg in args):
        return function(*args, **kwargs)  # torch.fx follows it, where norms are leaves
    outer = current()
    known: Mapping[str, Any] = {} if outer is None else outer.values
    if not given and outer is not None and all(one.name in known for one in inputs):
        if on_its_way() is outer:
            return function(*args, **kwargs)
        return _during(outer, function, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    samples = {tensor.shape[0] for tensor in tensors if tensor.ndim}
    samples |= {len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, (list, tuple))}
    values = {}
    for one in inputs:
        if one.name in given:
            one.refuse_misfit(given[one.name], samples)
        elif one.name not in known:
            one.refuse_missing()
        values[one.name] = given.get(one.name, known.get(one.name, one.default))
    call = Call({**known, **values})
    if is_looked_at():
        return _during(call, function, args, kwargs)
    call.begin(iter(tensors))
    output = _during(call, function, args, kwargs)
    call.end(output)
    return output


def _during(
    call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function while a call is the one on its way in this thread."""
    before = swapped(call)
    try:
        return function(*args, **kwargs)
    finally:
        swapped(before)


def _taken_out(
    inputs: Sequence[ExtraInput],
    own: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The extra inputs among a forward's arguments; ``None`` is as good as none."""
    given = {}
    for name in {one.name: None for one in inputs}:
        if name in own:
            at = own[name]
            value = kwargs.get(name, args[at] if at < len(args) else None)
        else:
            value = kwargs.pop(name, None)
        if value is not None:
            given[name] = value
    return given


@contextmanager
def giving(inputs: Sequence[ExtraInput], given: Mapping[str, Any]) -> Iterator[None]:
    """Let norms see extra inputs within a block, in this thread.

    Raises:
        InputError: an input is missing, does not fit, or is none that the norms take.
    """
    names = {one.name for one in inputs}
    for name in given:
        if name not in names:
            takes = ", ".join(sorted(names)) or "no extra input"
            raise InputError(f"{name}= is no extra input of its norms, which take {takes}")
    values = {}
    for one in inputs:
        if one.name in given:
            one.refuse_misfit(given[one.name], ())
        else:
            one.refuse_missing()
        values[one.name] = given.get(one.name, one.default)
    before = swapped(Call(values))
    try:
        yield
    finally:
        swapped(before)


def for_norm(name: str, one: ExtraInput, device: torch.device) -> Call:
    """The call that a norm is reached in, which has an input that it takes.

    Args:
        name: what errors call the norm.
        one: the input.
        device: where the norm's tensor is.

    Raises:
        InputError: there is none, nor a default; or what runs is a part of a forward once more,
            and which forward's is not known.
    """
    call = current(device)
    if call is not None and one.name in call.values:
        return call
    if not is_looked_at() and in_backward():
        raise InputError(
            f"{name} is run again in a backward that did not come through the output of the model "
            f"that {one.name}= was given to, so that its value is not known; let the loss follow "
            "from what the model returns"
        )
    if one.required:
        raise InputError(
            f"{name} is reached without {one.name}=: {one}; call the converted model with it, or "
            f"use `with normswap.given(model, {one.name}=...)` for other calls"
        )
    return Call({one.name: one.default})
