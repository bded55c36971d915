"""Parts of a forward's source that may be a norm written out: statements and an expression.

A region is what one call of a norm could take the place of: statements that follow each other,
all of which only name what they compute, and an expression of the statement after them. It reads
one thing that depends on the forward's arguments, and nothing that it computes is read elsewhere
but the value of the expression. What else it reads is the module's own, or around the forward.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from normswap.graph.candidates import STATISTICS, takes_statistics
from normswap.graph.forward import Forward, depends_on_arguments, names, source_of

__all__ = ["Region", "block_of", "regions_of"]

#: How many statements may stand before the one with the value.
_LONGEST = 10


@dataclass(frozen=True)
class Region:
    """A part of a forward that may be a norm.

    Args:
        number: its place among the forward's regions; larger ones come before those in them.
        block: the statements among which it stands.
        first: the place in the block of its first statement; last: of the one with the value.
        value: the expression.
        argument: the name of what it would normalize.
        attributes: what it reads of the module, itself.
    """

    number: int
    block: list[ast.stmt] = field(repr=False, compare=False)
    first: int
    last: int
    value: ast.expr = field(repr=False, compare=False)
    argument: str
    attributes: frozenset[str]

    @property
    def name(self) -> str:
        """The name that a norm in its place has in the module."""
        return f"handwritten_norm_{self.number}"

    @property
    def statements(self) -> list[ast.stmt]:
        """All but the one with the value."""
        return self.block[self.first : self.last]

    @property
    def line(self) -> int:
        """The line of the file where it begins."""
        return min(self.block[self.first].lineno, self.value.lineno)

    @property
    def nodes(self) -> set[int]:
        """The identities of the statements and expressions that it consists of."""
        parts = [*self.statements, self.value]
        kinds = (ast.stmt, ast.expr)  # others, such as what a name is read for, are shared
        return {id(node) for part in parts for node in ast.walk(part) if isinstance(node, kinds)}


def regions_of(cls: type[nn.Module]) -> tuple[Region, ...]:
    """The regions of a class's forward; none where its source cannot be read."""
    known: Any = cls
    if not takes_statistics(known):
        return ()
    forward = source_of(getattr(cls, "forward", None))
    return _regions(forward, known) if forward is not None else ()


@cache
def _regions(forward: Forward, cls: Any) -> tuple[Region, ...]:
    touched = depends_on_arguments(forward.tree)
    found = [
        region
        for block in _blocks(forward.tree)
        for last in range(len(block))
        for region in _ending_at(forward, cls, block, last, touched)
    ]
    found.sort(key=lambda region: -len(region[1]))
    return tuple(Region(number, *given) for number, (given, _) in enumerate(found))


def block_of(tree: ast.AST, statements: list[ast.stmt]) -> list[ast.stmt]:
    """The list in a tree that has some statements in it."""
    return next(block for block in _blocks(tree) if any(each is statements[0] for each in block))


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """All lists of statements that are run in order, but those of functions inside."""
    for node in ast.walk(tree):
        if node is not tree and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _ending_at(
    forward: Forward, cls: Any, block: list[ast.stmt], last: int, touched: set[str]
) -> Iterator[tuple[tuple[Any, ...], set[int]]]:
    """Regions whose value is an expression of one statement, with their nodes."""
    host = block[last]
    if not isinstance(host, (ast.Assign, ast.Return, ast.Expr, ast.AugAssign, ast.AnnAssign)):
        return
    for value in ast.walk(host):
        if not isinstance(value, (ast.BinOp, ast.Call)) or _is_inner(value, host):
            continue
        for first in range(last, max(last - _LONGEST, 0) - 1, -1):
            if first < last and not _only_names(block[first]):
                break
            parts = [*block[first:last], value]
            nodes = {id(node) for part in parts for node in ast.walk(part)}
            if not _has_statistics(parts, cls, forward):
                continue
            argument = _argument(forward, parts, touched)
            if argument and not _is_read_elsewhere(forward, block, first, last, nodes):
                attributes = frozenset(_attributes(forward, parts))
                yield (block, first, last, value, argument, attributes), nodes


def _is_inner(value: ast.expr, host: ast.stmt) -> bool:
    """Whether an expression is run by a function or a comprehension inside of the statement."""
    own = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return any(
        isinstance(node, own) and any(part is value for part in ast.walk(node))
        for node in ast.walk(host)
    )


def _only_names(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but to name a value, or several."""
    if isinstance(statement, ast.Assign):
        parts = [
            part
            for target in statement.targets
            for part in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
        return all(isinstance(part, ast.Name) for part in parts)
    return isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and isinstance(
        statement.target, ast.Name
    )


def _has_statistics(parts: list[Any], cls: Any, forward: Forward) -> bool:
    """Whether statistics are taken: here, or in a method or function that is called here."""
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return True
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        called = getattr(cls, name or "", None) or forward.scope.get(name or "")
        if name in STATISTICS or (hasattr(called, "__code__") and takes_statistics(cls, called)):
            return True
    return False


def _argument(forward: Forward, parts: list[Any], touched: set[str]) -> str:
    """The one name that is read here, set before and depends on the arguments, or nothing."""
    known = {forward.own, *forward.scope, *vars(builtins)}
    made: set[str] = set()
    read: set[str] = set()
    for part in parts:
        value = part if isinstance(part, ast.expr) else part.value
        if value is None:
            return ""
        loads = names(value)
        if isinstance(part, ast.AugAssign):
            loads |= names(part.target)
        read |= loads - made
        if isinstance(part, (ast.AnnAssign, ast.AugAssign)):
            made |= names(part.target)
        elif isinstance(part, ast.Assign):
            made |= {name for target in part.targets for name in names(target)}
    local = {name for name in read if name in touched or name not in known}
    return local.pop() if len(local) == 1 and local <= touched else ""


def _is_read_elsewhere(
    forward: Forward, block: list[ast.stmt], first: int, last: int, nodes: set[int]
) -> bool:
    """Whether what is named here is read outside, but for what the last statement sets anew."""
    made = {
        node.id
        for statement in block[first:last]
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    host = block[last]
    targets = host.targets if isinstance(host, ast.Assign) else []
    reset = {target.id for target in targets if isinstance(target, ast.Name)}
    beside = {
        node.id
        for node in ast.walk(host)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in nodes
    }
    if made & beside:
        return True
    inside = {id(node) for node in ast.walk(host)} | nodes
    begins = 0 if _is_in_a_loop(forward.tree, host) else block[first].lineno
    return any(
        isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and node.lineno >= begins
        and node.id in made - reset
        and id(node) not in inside
        for node in ast.walk(forward.tree)
    )


def _is_in_a_loop(tree: ast.AST, statement: ast.stmt) -> bool:
    """Whether what stands before a statement may be run after it."""
    return any(
        isinstance(node, (ast.For, ast.While)) and any(each is statement for each in ast.walk(node))
        for node in ast.walk(tree)
    )


def _attributes(forward: Forward, parts: list[Any]) -> Iterator[str]:
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, ast.Attribute):
            attribute = forward.attribute(node)
            if attribute is not None:
                yield attribute
