"""Functions that add, or only lay out anew: which dimension of what they take is one of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.fx

__all__ = ["factor", "sources"]

#: A node and the dimension of it that is meant; ``None`` where a function is none of these.
Sources = list[tuple[torch.fx.Node, int]] | None


def sources(node: torch.fx.Node, dim: int) -> Sources:
    """What a dimension of a result is of what a function takes, where it mixes nothing along it.

    Args:
        node: a call of a function, in a graph of a recorded run.
        dim: a dimension of its result.

    Returns:
        Every tensor that is summed up or laid out anew, with the dimension that it is there. If
        the mean over that dimension is 0 in all of them it is 0 in the result. ``None`` for any
        other function.
    """
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    rule = _RULES.get(name.strip("_"), _RULES.get(name))
    return rule(node, dim) if rule is not None and "shape" in node.meta else None


def factor(node: torch.fx.Node, dim: int) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """What is multiplied, and the parameter of as many values as the dimension has that it is by.

    Args:
        node: a call of a function, in a graph of a recorded run.
        dim: a dimension of its result.

    Returns:
        Two nodes, of which the first is of the result's shape, and the second reads an attribute;
        ``None`` for any other function.
    """
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name.strip("_") not in ("mul", "imul", "rmul", "multiply") or len(node.all_input_nodes) != 2:
        return None
    size = _shape(node)[dim]
    for each, by in (node.all_input_nodes, node.all_input_nodes[::-1]):
        at, place = by, dim - (len(_shape(node)) - len(_shape(by)))
        if _shape(each) != _shape(node) or place < 0 or _shape(by)[place] != size:
            continue
        while (laid_out := sources(at, place)) and len(laid_out) == 1:
            at, place = laid_out[0]
        if at.op == "get_attr" and math.prod(_shape(by)) == math.prod(_shape(at)) == size:
            return each, at
    return None


def _sum(node: torch.fx.Node, dim: int) -> Sources:
    """A sum or difference, with broadcasting."""
    found = []
    given = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
    for each in given[:2]:
        if not isinstance(each, torch.fx.Node):
            return None
        at = dim - (len(_shape(node)) - len(_shape(each)))
        if at < 0 or _shape(each)[at] != _shape(node)[dim]:
            return None
        found.append((each, at))
    return found


def _same(node: torch.fx.Node, dim: int) -> Sources:
    """A copy, or another precision."""
    before = node.all_input_nodes[0]
    return [(before, dim)] if _shape(before) == _shape(node) else None


def _dropped(node: torch.fx.Node, dim: int) -> Sources:
    """Dropout that is off."""
    on = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    chance = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return _same(node, dim) if chance == 0 and not on else None


def _reshaped(node: torch.fx.Node, dim: int) -> Sources:
    """The same numbers in the same order: a dimension of this size with as many behind it."""
    before, after = node.all_input_nodes[0], _shape(node)
    shape = _shape(before)
    behind = math.prod(after[dim + 1 :])
    for at, size in enumerate(shape):
        if size == after[dim] > 1 and math.prod(shape[at + 1 :]) == behind:
            return [(before, at)]
    return None


def _transposed(node: torch.fx.Node, dim: int) -> Sources:
    """Two dimensions change places."""
    before, ndim = node.all_input_nodes[0], len(_shape(node))
    given: list[Any] = [*node.args[1:], *node.kwargs.values()]
    if len(given) != 2 or not all(isinstance(each, int) for each in given):
        return None
    one, other = (each % ndim for each in given)
    return [(before, {one: other, other: one}.get(dim, dim))]


def _permuted(node: torch.fx.Node, dim: int) -> Sources:
    """All dimensions change places."""
    before = node.all_input_nodes[0]
    given: list[Any] = [*node.args[1:], *node.kwargs.values()]
    order: Any = given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given
    return [(before, order[dim] % len(order))] if len(order) == len(_shape(node)) else None


def _expanded(node: torch.fx.Node, dim: int) -> Sources:
    """Repeated along other dimensions."""
    before = node.all_input_nodes[0]
    at = dim - (len(_shape(node)) - len(_shape(before)))
    return [(before, at)] if at >= 0 and _shape(before)[at] == _shape(node)[dim] else None


def _joined(node: torch.fx.Node, dim: int) -> Sources:
    """One behind the other along another dimension."""
    given = [*node.args[1:], *(node.kwargs[key] for key in ("dim", "axis") if key in node.kwargs)]
    along: Any = given[0] if given else 0
    parts: Any = node.args[0] if node.args else ()
    if along % len(_shape(node)) == dim or not all(isinstance(p, torch.fx.Node) for p in parts):
        return None
    return [(part, dim) for part in parts]


def _chosen(node: torch.fx.Node, dim: int) -> Sources:
    """A part, by whole numbers and slices, of which the dimension is kept whole."""
    before: Any = node.args[0]
    index: Any = node.args[1]
    index = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not isinstance(each, (int, slice, type(None), type(...))) for each in index):
        return None
    if any(isinstance(each, bool) for each in index):
        return None
    shape = _shape(before)
    taken = sum(each is not None and each is not ... for each in index)
    rest = [slice(None)] * (len(shape) - taken)
    place = index.index(...) if ... in index else len(index)
    index[place : place + 1] = rest
    at, place = 0, 0
    for each in index:
        if each is None:
            place += 1
            continue
        if isinstance(each, slice):
            if place == dim:
                return [(before, at)] if shape[at] == _shape(node)[dim] else None
            place += 1
        at += 1
    return None


def _averaged(node: torch.fx.Node, dim: int) -> Sources:
    """A mean or sum over other dimensions."""
    before = node.all_input_nodes[0]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    shape = _shape(before)
    if given is None or isinstance(given, torch.fx.Node):
        return None
    gone = {int(each) % len(shape) for each in (given if isinstance(given, Sequence) else [given])}
    left = [at for at in range(len(shape)) if keeps or at not in gone]
    return None if left[dim] in gone else [(before, left[dim])]


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


_RULES: dict[str, Callable[[torch.fx.Node, int], Sources]] = {
    **dict.fromkeys(("add", "iadd", "radd", "sub", "isub"), _sum),
    **dict.fromkeys(("contiguous", "clone", "to", "float", "double", "half", "bfloat16"), _same),
    **dict.fromkeys(("type", "type_as", "detach"), _same),
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), _reshaped),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transposed),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    **dict.fromkeys(("mean", "sum"), _averaged),
    "permute": _permuted,
    "dropout": _dropped,
    "getitem": _chosen,
}
