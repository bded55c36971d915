"""Functions made of a rewritten source, which see around them what the original sees."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["recompiled"]


def recompiled(function: Any, tree: ast.FunctionDef, added: Mapping[str, Any]) -> Any:
    """A method of a rewritten definition.

    Args:
        function: the original.
        tree: the definition, which is used up.
        added: what it sees beside what the original sees, by name.
    """
    code = _compiled(tree, function, added)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in added.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = dict(function.__annotations__)
    made.__doc__ = function.__doc__
    made.__qualname__ = function.__qualname__
    made.__module__ = function.__module__
    return made


def _compiled(tree: ast.FunctionDef, function: Any, added: Iterable[str]) -> types.CodeType:
    """The code of a method, compiled inside a class of the same name as it was.

    So private names are mangled as they were, and what it closed over is closed over again.
    """
    tree.returns = None
    for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs):
        argument.annotation = None
    for default in (tree.args.vararg, tree.args.kwarg):
        if default is not None:
            default.annotation = None
    # Defaults are the function's own objects, given to the new function as they are.
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [d and ast.Constant(None) for d in tree.args.kw_defaults]
    owner = [*"_", *function.__qualname__.split(".")][-2]
    owner = owner if owner.isidentifier() else "_"
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    around = ast.parse(f"def around({', '.join([*added, *free])}):\n class {owner}: pass")
    outer: Any = around.body[0]
    outer.body[0].body = [tree]
    ast.increment_lineno(tree, function.__code__.co_firstlineno - tree.lineno)
    whole = compile(ast.fix_missing_locations(around), inspect.getfile(function), "exec")
    return _inner(whole, ["around", owner, function.__name__])


def _inner(code: types.CodeType, names: list[str]) -> types.CodeType:
    for name in names:
        code = next(
            part
            for part in code.co_consts
            if isinstance(part, types.CodeType) and part.co_name == name
        )
    return code
