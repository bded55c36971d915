"""The source of a module's forward: what is read in it, and rewritten by it.

Some of what a forward does is no module: calls of functions that normalize or activate. They are
found in the source, so that all Python control flow around them stays what it is.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

__all__ = ["Forward", "depends_on_arguments", "in_order", "names", "resolved", "source_of"]

#: What an argument may be made of to be the module's own: no calls, no local names.
_PLAIN = (
    ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.BinOp,
    ast.BoolOp, ast.Compare, ast.Subscript, ast.Slice, ast.Load, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop,
)  # fmt: skip


@dataclass(frozen=True)
class Forward:
    """A forward as source.

    Args:
        function: the forward.
        tree: its definition, parsed; equal forwards are the same function.
    """

    function: Any
    tree: ast.FunctionDef = field(compare=False)

    @property
    def calls(self) -> list[ast.Call]:
        """All calls in it, outer before inner and as they stand in the source.

        Those in a function inside of it that calls something else by the module's name are none
        of the module's.
        """
        own = self.own
        skipped = {
            id(part)
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not self.tree
            if any(isinstance(arg, ast.arg) and arg.arg == own for arg in ast.walk(node.args))
            for part in ast.walk(node)
        }
        nodes = in_order(self.tree)
        return [node for node in nodes if isinstance(node, ast.Call) and id(node) not in skipped]

    def called(self, calls: list[ast.Call]) -> list[Any]:
        """The object that each call calls by a name from around the forward, or ``None``."""
        scope, local = self.scope, _locals(self.function)
        return [None if _root(c.func) in local else resolved(c.func, scope) for c in calls]

    @property
    def scope(self) -> dict[str, Any]:
        """The objects that the forward sees around it, by their names."""
        return _scope(self.function)

    def value(self, module: nn.Module, expression: ast.expr, *, training: bool) -> Any:
        """What an expression is for a module, in train or in eval mode.

        Raises:
            LookupError: it is not the module's own: it depends on the input, or calls something.
        """
        own = self.own
        found = names(expression)
        scope = self.scope
        plain = all(isinstance(node, _PLAIN) for node in ast.walk(expression))
        if not plain or not found <= {own, *scope} or found & (_locals(self.function) - {own}):
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


def source_of(function: Callable[..., Any] | None) -> Forward | None:
    """A forward's source; ``None`` where it cannot be read, or is not all that is run."""
    hashable: Any = function
    return _parsed(hashable)


@cache
def _parsed(function: Any) -> Forward | None:
    if getattr(function, "__code__", None) is None or hasattr(function, "__wrapped__"):
        return None
    tree = _tree(function)
    if tree is None or tree.decorator_list or not _arguments(tree):
        return None
    _mangle(tree, function.__qualname__)
    return Forward(function, tree)


def _mangle(tree: ast.FunctionDef, qualname: str) -> None:
    """Give private attributes the names that they have outside of their class's body."""
    owner = qualname.split(".")[-2].lstrip("_") if "." in qualname else ""
    for node in ast.walk(tree) if owner else ():
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            node.attr = node.attr if node.attr.endswith("__") else f"_{owner}{node.attr}"


def in_order(tree: ast.AST) -> list[ast.AST]:
    """All nodes, outer before inner and as they stand in the source."""
    return [tree, *(node for child in ast.iter_child_nodes(tree) for node in in_order(child))]


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


def resolved(expression: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The object that a dotted name stands for, or ``None``."""
    if isinstance(expression, ast.Name):
        return scope.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(resolved(expression.value, scope), expression.attr, None)
    return None


def _root(expression: ast.expr) -> str | None:
    """The name that a dotted name begins with, or ``None``."""
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


def names(node: ast.AST) -> set[str]:
    """The names in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def depends_on_arguments(tree: ast.FunctionDef) -> set[str]:
    """The names that hold what depends on the forward's arguments, by following assignments."""
    own, *rest = _arguments(tree)
    given = [*rest, *tree.args.kwonlyargs]
    given += [extra for extra in (tree.args.vararg, tree.args.kwarg) if extra]
    touched = {argument.arg for argument in given}
    while True:
        before = len(touched)
        for node in ast.walk(tree):
            for target, value in _assignments(node):
                if value is not None and names(value) & touched:
                    touched |= names(target) - {own.arg}
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
