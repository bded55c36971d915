"""Giving a module whose forward calls a norm function a norm of its own in that call's place.

The instance gets a generated subclass of its class. Its forward is the class's own source, in
which each call of a norm function first looks whether the instance has a norm for it. Nothing of
the forward is traced or frozen: its signature, its branches and all that it reads stay alive.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from normswap.errors import CannotConvert
from normswap.graph.calls import own_class
from normswap.graph.functional import Forward, forward_of
from normswap.norms.functional import child_name, refresh

__all__ = ["is_lifted", "lifted_class", "without_norms"]

_CALL = "__normswap_call__"


def lifted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose forward asks the instance for a norm at each call of a norm function.

    Raises:
        CannotConvert: the forward's source cannot be read.
    """
    hashable: Any = cls
    made: type[nn.Module] = _generated(hashable)
    return made


@cache
def _generated(cls: Any) -> Any:
    forward = forward_of(cls)
    if forward is None:
        raise CannotConvert(
            f"the source of {cls.__name__}.forward cannot be read", "leave it out by skip="
        )
    members = {
        "forward": _rewritten(forward),
        "_normswap_base": cls,
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), members)


def is_lifted(module: nn.Module) -> bool:
    """Whether a module has a generated class."""
    return own_class(module) is not type(module)


def without_norms(module: nn.Module, leaving: set[int]) -> bool:
    """Whether a lifted module has no norm for any call left once some of its children leave."""
    forward = forward_of(own_class(module))
    names = {child_name(call.kind, call.index) for call in forward.calls} if forward else set()
    held = (module._modules.get(name) for name in names)
    return all(child is None or id(child) in leaving for child in held)


def _reduce(module: nn.Module, protocol: int) -> Any:
    return _again, (own_class(module),), module.__dict__


def _again(cls: type[nn.Module]) -> nn.Module:
    generated = lifted_class(cls)
    return generated.__new__(generated)


def _call(
    owner: nn.Module, index: int, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What stands in the forward for a call of a norm function."""
    norm = owner._modules.get(child_name(kind, index))
    if norm is None:
        return function(*args, **kwargs)
    refresh(norm)
    return norm(args[0] if args else kwargs["input"])


def _rewritten(forward: Forward) -> Any:
    """The forward's function with its calls of norm functions going through `_call`."""
    function = forward.function
    tree = copy.deepcopy(forward.tree)
    own = forward.own
    twins = dict(zip(map(id, ast.walk(forward.tree)), ast.walk(tree), strict=True))
    for node, call in zip(forward.nodes, forward.calls, strict=True):
        twin: Any = twins[id(node)]
        place = [ast.Name(own, ast.Load()), ast.Constant(call.index), ast.Constant(call.kind)]
        twin.args = [*place, twin.func, *twin.args]
        twin.func = ast.Name(_CALL, ast.Load())
    code = _compiled(tree, function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_CALL] = types.CellType(_call)
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


def _compiled(tree: ast.FunctionDef, function: Any) -> types.CodeType:
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
    around = ast.parse(f"def around({', '.join([_CALL, *free])}):\n class {owner}: pass")
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
