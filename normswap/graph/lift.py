"""Giving a module whose forward calls a norm or an activation a child in that call's place.

The instance gets a generated subclass of its class. Its forward is the class's own source, in
which each such call first looks whether the instance has a child for it, as does each region that
is a norm written out, before its statements. Nothing of the forward is traced or frozen: its
signature, its branches and all that it reads stay alive.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterable
from functools import cache, partial
from operator import methodcaller
from typing import Any

from torch import nn

from normswap.errors import CannotConvert
from normswap.graph.activations import activation_calls
from normswap.graph.calls import own_class
from normswap.graph.forward import Forward, source_of
from normswap.graph.functional import norm_calls
from normswap.graph.recompile import recompiled
from normswap.graph.regions import Region, block_of, regions_of
from normswap.norms.functional import child_name, refresh
from normswap.norms.generated import generated

__all__ = ["is_lifted", "lifted_class", "without_children"]

_CALL = "__normswap_call__"
_HAS = "__normswap_has__"


def lifted_class(cls: type[nn.Module], children: Collection[str] = ()) -> type[nn.Module]:
    """The subclass whose forward asks the instance for a child at each call of either kind.

    And at the regions whose children are to be there.

    Args:
        cls: the class.
        children: names of children that the instance has or gets.

    Raises:
        CannotConvert: the forward's source cannot be read.
    """
    hashable: Any = cls
    numbers = {region.name: region.number for region in regions_of(cls)} if children else {}
    made: type[nn.Module] = _lifted(
        hashable, tuple(sorted(numbers[c] for c in {*children} & {*numbers}))
    )
    return made


@cache
def _lifted(cls: Any, numbers: tuple[int, ...]) -> Any:
    forward = source_of(getattr(cls, "forward", None))
    if forward is None:
        raise CannotConvert(
            f"the source of {cls.__name__}.forward cannot be read", "leave it out by skip="
        )
    regions = [regions_of(cls)[number] for number in numbers]
    return generated(
        cls,
        partial(lifted_class, children=tuple(region.name for region in regions)),
        forward=_rewritten(forward, regions),
        _normswap_lifted=True,
    )


def is_lifted(module: nn.Module) -> bool:
    """Whether a module's forward asks for children."""
    return getattr(type(module), "_normswap_lifted", False)


def without_children(module: nn.Module, leaving: set[int]) -> bool:
    """Whether a lifted module has no child for any call left once some of its children leave."""
    cls: Any = own_class(module)
    forward = source_of(cls.forward)
    names = [name for _, name, _ in _calls(forward)] if forward else []
    held = map(module._modules.get, [*names, *(region.name for region in regions_of(cls))])
    return all(child is None or id(child) in leaving for child in held)


def _call(owner: nn.Module, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """What stands in the forward for a call, of a function or of the input's method of a name."""
    child = owner._modules.get(name)
    if child is None:
        called = methodcaller(function) if isinstance(function, str) else function
        return called(*args, **kwargs)
    refresh(child)
    return child(args[0] if args else kwargs["input"])


def _has(owner: nn.Module, name: str) -> bool:
    """Whether a norm is there for a region."""
    return name in owner._modules


def _calls(forward: Forward) -> list[tuple[ast.Call, str, str | None]]:
    """The calls of both kinds, with the name of the child, and of the method if it is one."""
    norms = [(call.node, child_name(call.kind, call.index), None) for call in norm_calls(forward)]
    acts = [
        (call.node, call.name, call.called if call.is_method else None)
        for call in activation_calls(forward)
    ]
    return [*norms, *acts]


def _rewritten(forward: Forward, regions: Iterable[Region]) -> Any:
    """The forward's function with its calls going through `_call`, and regions for want of one."""
    function = forward.function
    tree = copy.deepcopy(forward.tree)
    own = forward.own
    twins = dict(zip(map(id, ast.walk(forward.tree)), ast.walk(tree), strict=True))
    for region in regions:
        _branch(region, twins, tree, own)
    for node, name, method in _calls(forward):
        twin: Any = twins[id(node)]
        called = [twin.func] if method is None else [ast.Constant(method), twin.func.value]
        twin.args = [ast.Name(own, ast.Load()), ast.Constant(name), *called, *twin.args]
        twin.func = ast.Name(_CALL, ast.Load())
    return recompiled(function, tree, {_CALL: _call, _HAS: _has})


def _branch(region: Region, twins: dict[int, Any], tree: ast.FunctionDef, own: str) -> None:
    """Let a region's statements stand where the instance has no child for them."""
    statements = [twins[id(each)] for each in region.block[region.first : region.last + 1]]
    block = block_of(tree, statements)
    host = copy.deepcopy(statements[-1])
    value = twins[id(region.value)]
    places = list(ast.walk(statements[-1]))
    place = next(at for at, node in enumerate(places) if node is value)
    twin: Any = list(ast.walk(host))[place]
    given = [ast.Name(own, ast.Load()), ast.Constant(region.name)]
    call = ast.Call(
        ast.Name(_CALL, ast.Load()),
        [*given, ast.Constant(None), ast.Name(region.argument, ast.Load())],
        [],
    )
    _replace(host, twin, ast.copy_location(call, value))
    test = ast.Call(ast.Name(_HAS, ast.Load()), given, [])
    at = next(i for i, each in enumerate(block) if each is statements[0])
    branch = ast.If(test=test, body=[host], orelse=statements)
    block[at : at + len(statements)] = [ast.copy_location(branch, statements[0])]


def _replace(root: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Put a node in the place of another one below a root."""
    for node in ast.walk(root):
        for name, held in ast.iter_fields(node):
            if held is old:
                setattr(node, name, new)
            elif isinstance(held, list):
                held[:] = [new if each is old else each for each in held]
