"""Rewriting the layers beside a norm, and bringing their parameters back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import CannotRevert
from normswap.norms.beside import Beside
from normswap.swap.changes import Changes

__all__ = ["Kept", "Pending", "restore"]


@dataclass(frozen=True)
class Kept:
    """One parameter of a neighbour as it was before a start rewrote it.

    Args:
        module: the neighbour.
        name: the parameter's name.
        before: its values, or ``None`` if there was none.
        after: its values afterwards: what has changed since then cannot be parted again.
    """

    module: nn.Module
    name: str
    before: Tensor | None
    after: Tensor


class Pending:
    """Rewrites that are planned and not made: two norms may rewrite the same layer.

    Args:
        changes: where they are collected.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._values: dict[tuple[int, str], Tensor] = {}
        self._new: dict[tuple[int, str], nn.Parameter] = {}

    def look(self, module: nn.Module, name: str) -> Any:
        """A parameter as it will be when what is pending is made."""
        return self._values.get((id(module), name), module._parameters[name])

    def add(self, beside: Beside) -> tuple[Kept, ...]:
        """Plan a rewrite.

        Returns:
            What brings the parameters back as they are before it.
        """
        module, kept = beside.module, []
        with torch.no_grad():
            for name, value in beside.values(self.look).items():
                before = self.look(module, name)
                kept.append(
                    Kept(
                        module,
                        name,
                        None if before is None else before.detach().clone(),
                        value.detach().clone(),
                    )
                )
                self._put(module, name, value)
        return tuple(kept)

    def _put(self, module: nn.Module, name: str, value: Tensor) -> None:
        key, own = (id(module), name), module._parameters[name]
        self._values[key] = value
        if own is not None:
            self._changes.writes.append((own, value))
        elif key in self._new:
            self._new[key].copy_(value)
        else:
            weight = module._parameters["weight"]
            trains = weight is not None and weight.requires_grad
            self._new[key] = nn.Parameter(value.clone(), requires_grad=trains)
            self._changes.parameters.append((module, name, self._new[key]))


def restore(kept: Iterable[Kept], changes: Changes) -> None:
    """Add to ``changes`` what brings parameters back.

    Args:
        kept: what was kept, in the order in which it was rewritten.
        changes: where the changes are collected.

    Raises:
        CannotRevert: a parameter has changed since, and both cannot be had.
    """
    last: set[tuple[int, str]] = set()
    for one in reversed(list(kept)):
        key, own = (id(one.module), one.name), one.module._parameters[one.name]
        if key not in last and own is not None and not _same(own, one.after):
            raise CannotRevert(
                f"the {one.name} of a {type(one.module).__name__} has changed since a norm was "
                "folded into it (trained, or loaded), and the two cannot be parted again; keep a "
                "copy of the model before folding"
            )
        last.add(key)
        if one.before is None:
            changes.parameters.append((one.module, one.name, None))
        elif own is not None:
            changes.writes.append((own, one.before.to(own)))


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether values are what they were, up to a change of precision."""
    return now.is_meta or then.is_meta or torch.equal(now, then.to(now))
