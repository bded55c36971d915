"""What starts change outside of their norms, planned before anything is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.beside import Beside, Centred, Remade, Replaced, Rewritten
from normswap.norms.remake import parts, remade
from normswap.swap.changes import Changes
from normswap.swap.kept import Kept, KeptActivation, KeptClass, KeptMean, KeptParameter

__all__ = ["Pending"]


class Pending:
    """What is planned and not made: two norms may rewrite the same layer.

    Args:
        changes: where the changes are collected.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._values: dict[tuple[int, str], Tensor | None] = {}
        self._new: dict[tuple[int, str], nn.Parameter] = {}
        self._centred: set[tuple[int, str, int]] = set()

    def look(self, module: nn.Module, name: str) -> Any:
        """A parameter as it will be when what is pending is made."""
        return self._values.get((id(module), name), module._parameters[name])

    def add(self, beside: Beside) -> tuple[Kept, ...]:
        """Plan one change.

        Returns:
            What brings things back as they are before it.
        """
        if isinstance(beside, Rewritten):
            return tuple(self._rewrite(beside))
        if isinstance(beside, Centred):
            return tuple(self._centre(beside))
        if isinstance(beside, Remade):
            return (self._remake(beside),)
        return (self._replace(beside),)

    def _remake(self, beside: Remade) -> Kept:
        module, changed = beside.module, self._changes.classes
        present = [cls for each, cls in changed if each is module] or [type(module)]
        before, cls = parts(present[-1])
        changed.append((module, remade(beside.mixin, cls)))
        return KeptClass(module, cls, beside.mixin, before)

    def _replace(self, beside: Replaced) -> Kept:
        activation, new = beside.activation, beside.make()
        if activation.module is not None:
            new.training = activation.module.training
            self._changes.modules.append((activation.module, new))
        elif activation.owner is not None:
            owner = activation.owner
            new.training = owner.training
            self._changes.children.append((owner, activation.name, new))
        return KeptActivation(new, activation.module)

    def _rewrite(self, beside: Rewritten) -> list[Kept]:
        module, kept = beside.module, list[Kept]()
        with torch.no_grad():
            for name, value in beside.values(self.look).items():
                before: Tensor | None = self.look(module, name)
                kept.append(
                    KeptParameter(
                        module,
                        name,
                        module._parameters[name],
                        None if before is None else before.detach().clone(),
                        None if value is None else value.detach().clone(),
                    )
                )
                self._put(module, name, value)
        return kept

    def _centre(self, beside: Centred) -> list[Kept]:
        module, name, key = beside.module, beside.name, (id(beside.module), beside.name, beside.dim)
        parameter, before = module._parameters[name], self.look(module, name)
        if key in self._centred or before is None:
            return []
        self._centred.add(key)
        with torch.no_grad():
            value = beside.value(self.look)
            kept = KeptMean(module, name, parameter, before.detach().clone(), value.clone())
            self._put(module, name, value)
        return [kept]

    def _put(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        key, own = (id(module), name), module._parameters[name]
        self._values[key] = value
        if value is None:
            self._changes.parameters.append((module, name, None))
        elif own is not None:
            self._changes.writes.append((own, value))
        elif key in self._new:
            self._new[key].copy_(value)
        else:
            weight = module._parameters["weight"]
            trains = weight is not None and weight.requires_grad
            self._new[key] = nn.Parameter(value.clone(), requires_grad=trains)
            self._changes.parameters.append((module, name, self._new[key]))
