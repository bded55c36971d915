"""Finding functional norms: calls such as ``F.layer_norm(x, ...)`` in a module's own forward.

They are found in the forward's source, so that all Python control flow around them stays what it
is. Two things are asked of a call: what it normalizes depends on the forward's arguments, which
the weights that weight standardization normalizes do not; and all else that it is given is the
module's own, an attribute or a constant, so that the norm is known before any forward.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Call", "Forward", "forward_of"]

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

#: What an argument may be made of to be the module's own: no calls, no local names.
_PLAIN = (
    ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.BinOp,
    ast.BoolOp, ast.Compare, ast.Subscript, ast.Slice, ast.Load, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop,
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a norm function in a forward.

    Args:
        index: its place among the forward's calls of norm functions, in the order of the source.
        kind: the norm's family.
        line: the line of the file.
        arguments: the expressions of what it is given after its input, by parameter.
        normalizes_input: whether its input depends on the forward's arguments.
        opaque: whether it is given unpacked arguments, of which nothing is known.
    """

    index: int
    kind: str
    line: int
    arguments: Mapping[str, ast.expr]
    normalizes_input: bool
    opaque: bool = False


@dataclass(frozen=True)
class Forward:
    """A forward with calls of norm functions, as source.

    Args:
        function: the forward.
        tree: its definition, parsed.
        nodes: the calls in the tree, in the order of the source.
        calls: what each of them is.
    """

    function: Any
    tree: ast.FunctionDef
    nodes: tuple[ast.Call, ...]
    calls: tuple[Call, ...]

    def value(self, module: nn.Module, expression: ast.expr, *, training: bool) -> Any:
        """What an expression is for a module, in train or in eval mode.

        Raises:
            LookupError: it is not the module's own: it depends on the input, or calls something.
        """
        own = self.own
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        scope = _scope(self.function)
        plain = all(isinstance(node, _PLAIN) for node in ast.walk(expression))
        if not plain or not names <= {own, *scope} or names & (_locals(self.function) - {own}):
            raise LookupError(ast.unparse(expression))
        code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<norm>", "eval")
        try:
            return eval(code, dict(scope), {own: _InMode(module, training)})
        except Exception as error:
            raise LookupError(f"{ast.unparse(expression)}: {error}") from None

    @property
    def own(self) -> str:
        """What the forward calls the module: ``self``."""
        return _arguments(self.tree)[0].arg

    def reads(self, attribute: str) -> int:
        """How often the forward reads an attribute of the module."""
        return sum(
            isinstance(node, ast.Attribute) and self.attribute(node) == attribute
            for node in ast.walk(self.tree)
        )

    def attribute(self, expression: ast.expr | None) -> str | None:
        """The dotted attribute of the module that an expression is, or ``None``."""
        parts = []
        while isinstance(expression, ast.Attribute):
            parts.append(expression.attr)
            expression = expression.value
        if isinstance(expression, ast.Name) and expression.id == self.own:
            return ".".join(reversed(parts)) or None
        return None


class _InMode:
    """A module as it is in one mode."""

    def __init__(self, module: nn.Module, training: bool) -> None:
        self._module, self._training = module, training

    def __getattr__(self, name: str) -> Any:
        return self._training if name == "training" else getattr(self._module, name)


def forward_of(cls: type[nn.Module]) -> Forward | None:
    """The forward of a class, if it calls norm functions and its source can be read."""
    return _parsed(getattr(cls, "forward", None))  # a scripted class has none to show


@cache
def _parsed(function: Callable[..., Any] | None) -> Forward | None:
    code = getattr(function, "__code__", None)
    if (
        function is None
        or code is None
        or not _NAMES & set(code.co_names)
        or hasattr(function, "__wrapped__")
    ):
        return None
    tree = _tree(function)
    if tree is None or tree.decorator_list or not _arguments(tree):
        return None
    _mangle(tree, function.__qualname__)
    scope = _scope(function)
    found = [
        (node, known)
        for node in _in_order(tree)
        if isinstance(node, ast.Call)
        for known in [_FUNCTIONS.get(_resolved(node.func, scope))]
        if known is not None
    ]
    if not found:
        return None
    touched = _depends_on_arguments(tree)
    calls = []
    for index, (node, (kind, parameters)) in enumerate(found):
        given = dict(zip(("input", *parameters), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        normalized = given.pop("input", None)
        depends = normalized is not None and bool(_names(normalized) & touched)
        unpacked = any(isinstance(argument, ast.Starred) for argument in node.args)
        unpacked |= any(keyword.arg is None for keyword in node.keywords)
        calls.append(Call(index, kind, node.lineno, given, depends or unpacked, unpacked))
    return Forward(function, tree, tuple(node for node, _ in found), tuple(calls))


def _mangle(tree: ast.FunctionDef, qualname: str) -> None:
    """Give private attributes the names that they have outside of their class's body."""
    owner = qualname.split(".")[-2].lstrip("_") if "." in qualname else ""
    for node in ast.walk(tree) if owner else ():
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            node.attr = node.attr if node.attr.endswith("__") else f"_{owner}{node.attr}"


def _in_order(tree: ast.AST) -> list[ast.AST]:
    """All nodes, outer before inner and as they stand in the source."""
    return [tree, *(node for child in ast.iter_child_nodes(tree) for node in _in_order(child))]


def _scope(function: Any) -> dict[str, Any]:
    """The names that a function sees around it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    free = {name: _content(cell) for name, cell in cells if name != "__class__"}
    return {**function.__globals__, **free}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _locals(function: Any) -> set[str]:
    """The names that a function, or one inside it, binds."""
    return _bound(function.__code__)


def _bound(code: types.CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return {*code.co_varnames, *code.co_cellvars}.union(*map(_bound, inner))


def _arguments(tree: ast.FunctionDef) -> list[ast.arg]:
    return [*tree.args.posonlyargs, *tree.args.args]


def _tree(function: Any) -> ast.FunctionDef | None:
    """The definition of a function, with the line numbers of its file; ``None`` without source."""
    try:
        source = inspect.getsource(function)
        # Not dedented: a string over several lines would change.
        found = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else f"if 1:\n {source}")
    except (OSError, TypeError, SyntaxError):
        return None
    body: Any = found.body[0]
    tree = body.body[0]
    if not isinstance(tree, ast.FunctionDef):
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 2)
    return tree


def _resolved(expression: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The object that a dotted name stands for, or ``None``."""
    if isinstance(expression, ast.Name):
        return scope.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(_resolved(expression.value, scope), expression.attr, None)
    return None


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _depends_on_arguments(tree: ast.FunctionDef) -> set[str]:
    """The names that hold what depends on the forward's arguments, by following assignments."""
    own, *rest = _arguments(tree)
    given = [*rest, *tree.args.kwonlyargs]
    given += [extra for extra in (tree.args.vararg, tree.args.kwarg) if extra]
    touched = {argument.arg for argument in given}
    while True:
        before = len(touched)
        for node in ast.walk(tree):
            for target, value in _assignments(node):
                if value is not None and _names(value) & touched:
                    touched |= _names(target) - {own.arg}
        if len(touched) == before:
            return touched


def _assignments(node: ast.AST) -> list[tuple[ast.AST, ast.AST | None]]:
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
        return [(node.target, node.value)]
    if isinstance(node, (ast.For, ast.comprehension)):
        return [(node.target, node.iter)]
    if isinstance(node, ast.withitem) and node.optional_vars is not None:
        return [(node.optional_vars, node.context_expr)]
    return []
