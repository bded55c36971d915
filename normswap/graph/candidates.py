"""Which modules of unknown classes may be norms: told from their code, before any is run."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from normswap.norms.registry import reader

__all__ = [
    "STATISTICS",
    "arguments",
    "is_candidate",
    "reached_code",
    "reached_names",
    "takes_statistics",
]

#: What a forward that takes statistics calls, in one form or another.
STATISTICS = {
    *("mean", "var", "std", "var_mean", "std_mean", "pow", "square", "rsqrt", "sqrt", "norm"),
    *("vector_norm", "normalize", "batch_norm", "layer_norm", "group_norm", "instance_norm"),
    *("rms_norm", "native_layer_norm"),
}

#: Weight and bias, or what stands for them.
_MOST_PARAMETERS = 2


def is_candidate(module: nn.Module) -> bool:
    """Whether a module is worth a closer look: childless, few tensors, statistics in its code.

    All tensors that it has must be of one value for each channel, or single values.
    """
    cls: Any = type(module)
    if module._modules or "forward" in vars(module) or not takes_statistics(cls):
        return False
    parameters = [each for each in module._parameters.values() if each is not None]
    buffers = [each for each in module._buffers.values() if each is not None]
    sizes = {each.numel() for each in (*parameters, *buffers)} - {1}
    return len(parameters) <= _MOST_PARAMETERS and len(sizes) <= 1


def arguments(cls: type[nn.Module]) -> list[str]:
    """The names of what a class's forward can be given: a caller may give all of it."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    return [each.name for each in parameters]


@cache
def takes_statistics(cls: Any, function: Any = None) -> bool:
    """Whether a class's forward, or a method or function that it calls, names a statistic.

    Or it is a known norm's with more around it.

    Args:
        cls: the class.
        function: another function than its forward.
    """
    if reader(cls) is not None:
        return True
    looked_at = inspect.unwrap(cls.forward if function is None else function)
    return any(STATISTICS & set(code.co_names) for code in _reached(looked_at, cls, set()))


def reached_names(cls: Any, methods: Iterable[str]) -> set[str]:
    """All attributes that methods of a class may read, and what they call of its class and file."""
    return {name for code in reached_code(cls, methods) for name in code.co_names}


def reached_code(cls: Any, methods: Iterable[str]) -> list[types.CodeType]:
    """The code of methods of a class and of what they call of its class and file, each once."""
    functions = [inspect.unwrap(getattr(cls, name)) for name in methods if hasattr(cls, name)]
    seen: set[types.CodeType] = set()
    return [code for function in functions for code in _reached(function, cls, seen)]


def _reached(function: Any, cls: type, seen: set[types.CodeType]) -> Iterator[types.CodeType]:
    """The code of a function and of what it calls of its class and its file."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType) or code in seen:
        return
    seen.add(code)
    yield code
    scope = getattr(function, "__globals__", {})
    for name in code.co_names:
        called = getattr(cls, name, None) if hasattr(cls, name) else scope.get(name)
        inner = getattr(called, "__code__", None)
        own = inner is not None and not (getattr(called, "__module__", None) or "").startswith(
            "torch."
        )
        if own and not hasattr(nn.Module, name):
            yield from _reached(called, cls, seen)
