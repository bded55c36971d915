"""Norms written out in a forward: regions of its source that behave like one."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from normswap.graph.behaviour import Behaviour, Unexplained, explained
from normswap.graph.calls import own_class
from normswap.graph.candidates import reached_names
from normswap.graph.forward import Forward, source_of
from normswap.graph.functional import norm_calls
from normswap.graph.known import kind_of, read_by_behaviour
from normswap.graph.recompile import recompiled
from normswap.graph.regions import Region, regions_of
from normswap.norms.functional import FunctionalNorm

__all__ = ["handwritten_norms", "may_have_handwritten"]

_FOUND: WeakKeyDictionary[type[nn.Module], dict[Any, Behaviour | Unexplained]]
_FOUND = WeakKeyDictionary()


def may_have_handwritten(module: nn.Module) -> bool:
    """Whether a module's forward has regions that may be norms."""
    return "forward" not in vars(module) and bool(regions_of(own_class(module)))


def handwritten_norms(module: nn.Module) -> Iterator[tuple[FunctionalNorm, str]]:
    """The norms written out in a module's forward that are not yet norms of its own.

    A region is run by itself, in double precision and with numbers of its own, and is one if a
    formula can be told that gives its outputs, see `normswap.graph.behaviour`.

    Yields:
        What stands for the region, and how it was recognised.
    """
    cls: Any = own_class(module)
    forward = source_of(cls.forward) if may_have_handwritten(module) else None
    taken = {id(call.node) for call in norm_calls(forward)} if forward else set()
    for region in regions_of(cls) if forward else ():
        if forward is None or region.nodes & taken:
            continue
        if region.name in module._modules:
            taken |= region.nodes
            continue
        found = _found(module, region, forward)
        if isinstance(found, Behaviour):
            taken |= region.nodes
            yield _stub(module, region, forward, found), found.words


def _found(module: nn.Module, region: Region, forward: Forward) -> Behaviour | Unexplained:
    cls = own_class(module)
    alone = _alone(module, region, forward)
    if alone is None:
        return Unexplained("it calls other modules")
    of_class = _FOUND.setdefault(cls, {})
    kind = (region.number, kind_of(alone))
    if kind[1] is None:
        return explained(alone)
    if kind not in of_class:
        of_class[kind] = explained(alone)
    return of_class[kind]


def _alone(module: nn.Module, region: Region, forward: Forward) -> nn.Module | None:
    """A module that computes the region alone; ``None`` if that takes more than tensors."""
    cls: Any = own_class(module)
    made, names = _class_of(cls, region, forward)
    alone: nn.Module = object.__new__(made)
    nn.Module.__init__(alone)
    for name in names:
        if name in module._modules:
            return None
        for held in ("_parameters", "_buffers"):
            if name in getattr(module, held):
                getattr(alone, held)[name] = getattr(module, held)[name]
        if name in vars(module) and name not in vars(alone):
            vars(alone)[name] = vars(module)[name]
    per_channel = (*alone.parameters(), *alone.buffers())
    return alone if any(tensor.numel() > 1 for tensor in per_channel) else None


@cache
def _class_of(cls: Any, region: Region, forward: Forward) -> tuple[Any, frozenset[str]]:
    """A class whose forward is the region alone, and the names of what it reads of the module."""
    definition = copy.deepcopy(forward.tree)
    definition.args = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(forward.own), ast.arg(region.argument)],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[],
    )
    definition.body = [*copy.deepcopy(region.statements), ast.Return(copy.deepcopy(region.value))]
    function = recompiled(forward.function, definition, {})
    function.__defaults__ = function.__kwdefaults__ = None
    read = {attribute.partition(".")[0] for attribute in region.attributes}
    names = frozenset(read | reached_names(cls, region.attributes))
    return type(cls.__name__, (cls,), {"forward": function}), names


def _stub(module: nn.Module, region: Region, forward: Forward, found: Behaviour) -> FunctionalNorm:
    """What stands for a region, with the owner's tensors."""
    state = replace(read_by_behaviour(module, found), names={})
    words = f"written out, line {region.line}"
    stub = FunctionalNorm(words, region.name, state, found.names)
    stub.origin = "handwritten"
    stub.training = module.training
    inside = [
        forward.attribute(node)
        for part in (*region.statements, region.value)
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute)
    ]
    stub.shared = any(forward.reads(each) > inside.count(each) for each in found.names.values())
    return stub
