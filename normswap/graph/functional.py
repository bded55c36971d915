"""Finding functional norms: calls such as ``F.layer_norm(x, ...)`` in a module's own forward.

They are found in the forward's source, so that all Python control flow around them stays what it
is. Two things are asked of a call: what it normalizes depends on the forward's arguments, which
the weights that weight standardization normalizes do not; and all else that it is given is the
module's own, an attribute or a constant, so that the norm is known before any forward.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normswap.graph.forward import Forward, depends_on_arguments, names, source_of

__all__ = ["Call", "forward_of", "norm_calls"]

_BATCH = "running_mean running_var weight bias training momentum eps"
_INSTANCE = "running_mean running_var weight bias use_input_stats momentum eps"
_TORCH = "weight bias running_mean running_var"

#: The functions that normalize: the family, and the parameters after the input in order.
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    function: (kind, tuple(parameters.split()))
    for function, kind, parameters in (
        (F.batch_norm, "batch_norm", _BATCH),
        (F.instance_norm, "instance_norm", _INSTANCE),
        (F.layer_norm, "layer_norm", "normalized_shape weight bias eps"),
        (F.group_norm, "group_norm", "num_groups weight bias eps"),
        (F.rms_norm, "rms_norm", "normalized_shape weight eps"),
        (torch.batch_norm, "batch_norm", f"{_TORCH} training momentum eps cudnn_enabled"),
        (torch.instance_norm, "instance_norm", f"{_TORCH} use_input_stats momentum eps cudnn"),
        (torch.layer_norm, "layer_norm", "normalized_shape weight bias eps cudnn_enable"),
        (torch.group_norm, "group_norm", "num_groups weight bias eps cudnn_enabled"),
        (torch.rms_norm, "rms_norm", "normalized_shape weight eps"),
    )
}
_NAMES = frozenset(function.__name__ for function in _FUNCTIONS)


@dataclass(frozen=True)
class Call:
    """One call of a norm function in a forward.

    Args:
        node: the call in the forward's tree.
        index: its place among the forward's calls of norm functions, in the order of the source.
        kind: the norm's family.
        arguments: the expressions of what it is given after its input, by parameter.
        normalizes_input: whether its input depends on the forward's arguments.
        opaque: whether it is given unpacked arguments, of which nothing is known.
    """

    node: ast.Call
    index: int
    kind: str
    arguments: Mapping[str, ast.expr]
    normalizes_input: bool
    opaque: bool = False

    @property
    def line(self) -> int:
        """The line of the file."""
        return self.node.lineno


def forward_of(cls: type[nn.Module]) -> Forward | None:
    """The forward of a class, if it calls norm functions and its source can be read."""
    function = getattr(cls, "forward", None)  # a scripted class has none to show
    code = getattr(function, "__code__", None)
    if code is None or not _NAMES & set(code.co_names):
        return None
    forward = source_of(function)
    return forward if forward is not None and norm_calls(forward) else None


@cache
def norm_calls(forward: Forward) -> tuple[Call, ...]:
    """The calls of norm functions in a forward, in the order of the source."""
    made = forward.calls
    found = [
        (node, known)
        for node, function in zip(made, forward.called(made), strict=True)
        for known in [_FUNCTIONS.get(function)]
        if known is not None
    ]
    touched = depends_on_arguments(forward.tree) if found else set()
    calls = []
    for index, (node, (kind, parameters)) in enumerate(found):
        given = dict(zip(("input", *parameters), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        normalized = given.pop("input", None)
        depends = normalized is not None and bool(names(normalized) & touched)
        unpacked = any(isinstance(argument, ast.Starred) for argument in node.args)
        unpacked |= any(keyword.arg is None for keyword in node.keywords)
        calls.append(Call(node, index, kind, given, depends or unpacked, unpacked))
    return tuple(calls)
