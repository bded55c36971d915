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
        print: what it was afterwards, in two sums: training since then shows in them.
    """

    module: nn.Module
    name: str
    before: Tensor | None
    print: tuple[float, float] | None


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
                        _print(value),
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
        CannotRevert: a parameter has been trained since, and both cannot be had.
    """
    last: set[tuple[int, str]] = set()
    for one in reversed(list(kept)):
        key, own = (id(one.module), one.name), one.module._parameters[one.name]
        if key not in last and own is not None and not _same(_print(own), one.print, own.dtype):
            raise CannotRevert(
                f"the {one.name} of a {type(one.module).__name__} was trained after a norm was "
                "folded into it, and cannot be parted from it again; keep a copy before folding"
            )
        last.add(key)
        if one.before is None:
            changes.parameters.append((one.module, one.name, None))
        elif own is not None:
            changes.writes.append((own, one.before.to(own)))


def _print(tensor: Tensor) -> tuple[float, float] | None:
    """Two sums that training does not leave alone; nothing where there are no values."""
    if tensor.device.type == "meta":
        return None
    values = tensor.detach().double()
    return float(values.sum()), float(values.abs().sum())


def _same(
    now: tuple[float, float] | None, then: tuple[float, float] | None, dtype: torch.dtype
) -> bool:
    """Whether two prints are of the same values, up to a change of precision."""
    if now is None or then is None:
        return True
    slack = 4 * torch.finfo(dtype).eps * max(then[1], 1e-30)
    return all(abs(a - b) <= slack for a, b in zip(now, then, strict=True))
