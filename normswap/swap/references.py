"""Norms that refer to modules elsewhere refer to what stands there after a swap."""

from __future__ import annotations

from torch import nn

from normswap.norms.base import Norm
from normswap.swap.changes import Changes

__all__ = ["keep_references"]


def keep_references(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` that references to what it replaces become ones to the replacements.

    Args:
        model: the model to be changed.
        changes: its replacements, complete.
    """
    replacement = {id(old): new for old, new in changes.modules}
    news = [new for _, new in changes.modules]
    for module in (*model.modules(), *news):
        for name in module.references if isinstance(module, Norm) else ():
            new = replacement.get(id(vars(module).get(name)))
            if new is not None:
                changes.attributes.append((module, name, new))
