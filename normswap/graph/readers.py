"""Who reads the tensors and settings of a norm, beside or instead of calling it.

It is told from code: wherever a method says ``self.norm.weight``, or the like of anything else,
the class reads ``weight`` of what it calls ``norm``.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn

from normswap.graph.candidates import reached_code

__all__ = ["methods_that_read", "read_attributes"]

_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def read_attributes(owner: nn.Module, name: str) -> frozenset[str]:
    """What the forward of a module reads of its child of a name; of torch's own modules nothing.

    Args:
        owner: the module.
        name: what it calls the child.
    """
    cls: Any = type(owner)
    if (cls.forward.__module__ or "").startswith("torch."):  # these are kept in step otherwise
        return frozenset()
    return frozenset(read for child, read in _reads(cls) if child == name)


@cache
def methods_that_read(cls: Any, names: frozenset[str]) -> Mapping[str, frozenset[str]]:
    """The methods of a class that read attributes of some names, and are no part of its forward.

    Args:
        cls: the class, of which what torch has in every module counts for nothing.
        names: all these names have to be read.

    Returns:
        By name of the method, all names that it, and what it calls of its class and file, reads.
    """
    forward = set(reached_code(cls, ["forward", "__init__"]))
    found = {}
    for name in dir(cls):
        if not name.startswith("__") and not hasattr(nn.Module, name):
            code = set(reached_code(cls, [name])) - forward
            found[name] = frozenset(read for each in code for read in each.co_names)
    return {name: read for name, read in found.items() if names <= read}


@cache
def _reads(cls: Any) -> frozenset[tuple[str, str]]:
    """Pairs of an attribute's name and what is read of it, in a forward and what it calls."""
    return frozenset(
        pair
        for code in reached_code(cls, ["forward"])
        for pair in _pairs(dis.get_instructions(code))
    )


def _pairs(code: Iterable[dis.Instruction]) -> Iterator[tuple[str, str]]:
    told = (each for each in code if each.opname != "CACHE")
    for one, other in pairwise(told):
        if one.opname in _ATTRIBUTE and other.opname in _ATTRIBUTE:
            yield one.argval, other.argval
