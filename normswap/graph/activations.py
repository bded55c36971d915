"""Finding activations that a forward calls: modules of its own, functions, and methods of tensors.

They are found in the forward's source, as norm functions are, and a module may be given a child
in the place of each single call: also where one ReLU serves many norms.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter, methodcaller
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.graph.forward import Forward

__all__ = ["ACTIVATION_NAMES", "ActivationCall", "activation_calls", "applied", "is_activation"]

#: torch's activations, by their names in lower case.
ACTIVATION_NAMES = frozenset(
    name.lower() for name in nn.modules.activation.__all__ if name != "MultiheadAttention"
) | {"relu_", "silu_", "hardswish_", "leaky_relu", "leaky_relu_", "hard_sigmoid", "log_softmax"}

_FUNCTIONS = frozenset(
    getattr(module, name)
    for module in (F, torch)
    for name in (*ACTIVATION_NAMES, "elu_", "selu_", "hardtanh_", "tanh_", "sigmoid_")
    if callable(getattr(module, name, None))
)
_METHODS = frozenset({"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"})


def is_activation(module: object) -> bool:
    """Whether an object is a module that activates, by the name of its class."""
    return isinstance(module, nn.Module) and type(module).__name__.lower() in ACTIVATION_NAMES


@dataclass(frozen=True)
class ActivationCall:
    """One call in a forward that may be one of an activation.

    Args:
        node: the call in the forward's tree.
        name: the name that a child of the module in the place of this call has.
        called: a function; the name of a tensor's method; or of a module's attribute, with a dot
            in front.
    """

    node: ast.Call
    name: str
    called: Any

    @property
    def attribute(self) -> str | None:
        """The attribute of the module that is called, or ``None``."""
        dotted = isinstance(self.called, str) and self.called.startswith(".")
        return self.called[1:] if dotted else None

    @property
    def is_method(self) -> bool:
        """Whether it is a method of the input."""
        return isinstance(self.called, str) and self.attribute is None

    def function(self, module: nn.Module, forward: Forward) -> Callable[..., Any] | None:
        """What one instance calls here, of the input alone; ``None`` if it is no activation.

        Args:
            module: the instance.
            forward: the forward of its class.
        """
        if self.attribute is not None:
            try:
                held: Any = attrgetter(self.attribute)(module)
            except AttributeError:
                return None
            return held if is_activation(held) else None
        if self.is_method:
            return methodcaller(self.called)
        keywords = [keyword for keyword in self.node.keywords if keyword.arg != "input"]
        names = [keyword.arg for keyword in keywords]
        given = [*self.node.args[1:], *(keyword.value for keyword in keywords)]
        try:
            values = [forward.value(module, expression, training=True) for expression in given]
        except LookupError:
            return None
        if any(isinstance(value, Tensor) for value in values):
            return None  # it learns
        further = len(values) - len(names)
        named = {name: v for name, v in zip(names, values[further:], strict=True) if name}
        named.pop("inplace", None)
        return partial(applied, self.called, tuple(values[:further]), named)


def applied(
    function: Callable[..., Any], further: tuple[Any, ...], named: Mapping[str, Any], x: Any
) -> Any:
    """A function of a tensor and of other things, for ``partial`` to make one of the tensor."""
    return function(x, *further, **named)


@cache
def activation_calls(forward: Forward) -> tuple[ActivationCall, ...]:
    """The calls in a forward that may be of activations, in the order of the source."""
    counts: Counter[str] = Counter()
    found, made = [], forward.calls
    for node, function in zip(made, forward.called(made), strict=True):
        called, kind = _callee(node, forward, function)
        if kind:
            found.append(ActivationCall(node, f"{kind}_{counts[kind]}", called))
            counts[kind] += 1
    return tuple(found)


def _callee(node: ast.Call, forward: Forward, function: Any) -> tuple[Any, str]:
    """What a call calls, and the kind that its name tells; an empty kind for no activation."""
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    if starred or any(keyword.arg is None for keyword in node.keywords):
        return None, ""
    given = node.args or any(keyword.arg == "input" for keyword in node.keywords)
    if given and _is_among(function, _FUNCTIONS):
        return function, f"functional_{function.__name__.rstrip('_')}"
    alone = len(node.args) == 1 and not node.keywords
    attribute = forward.attribute(node.func)
    if attribute is not None:
        return f".{attribute}", f"{attribute.replace('.', '_')}_call" if alone else ""
    if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS and not node.args:
        return node.func.attr, "" if function else f"functional_{node.func.attr.rstrip('_')}"
    return None, ""


def _is_among(value: Any, known: frozenset[Any]) -> bool:
    try:
        return value in known
    except TypeError:  # not hashable
        return False
