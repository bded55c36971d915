"""How what a start changed outside of its norm goes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.errors import CannotRevert
from normswap.graph.calls import own_class
from normswap.norms.remake import Mixin, remade
from normswap.swap.changes import Changes

__all__ = ["Kept", "KeptActivation", "KeptClass", "KeptMean", "KeptParameter", "restore"]


class Kept(ABC):
    """One thing as it was before a start changed it."""

    @property
    def written(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters going back writes to."""
        return ()

    @property
    def lapses(self) -> bool:
        """Whether it goes back already where another norm takes the place of the one it is for."""
        return False

    @property
    def stands_in(self) -> nn.Module | None:
        """The module of the model that going back replaces, or ``None``."""
        return None

    @property
    def reaches_out(self) -> bool:
        """Whether other norms rely on it as it is now."""
        return False

    @abstractmethod
    def restore(self, changes: Changes, *, latest: bool) -> None:
        """Add to ``changes`` what brings it back.

        Args:
            changes: where the changes are collected.
            latest: whether no later start changed the same thing.

        Raises:
            CannotRevert: it has changed since, and both cannot be had.
        """

    @property
    @abstractmethod
    def thing(self) -> object:
        """What it is that was changed; equal for the same thing."""


@dataclass(frozen=True)
class KeptParameter(Kept):
    """One parameter of a neighbour.

    Args:
        module: the neighbour.
        name: the parameter's name.
        parameter: the parameter itself, or ``None`` if there was none.
        before: its values, or ``None``.
        after: its values afterwards, or ``None``: what has changed since cannot be parted again.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter | None
    before: Tensor | None
    after: Tensor | None

    @property
    def written(self) -> tuple[nn.Module, ...]:
        """The neighbour."""
        return (self.module,)

    @property
    def thing(self) -> object:
        """The parameter."""
        return id(self.module), self.name

    def restore(self, changes: Changes, *, latest: bool) -> None:
        """Write its values, or put it in its place again."""
        own = self.module._parameters[self.name]
        if latest and own is not None and self.after is not None and not _same(own, self.after):
            raise CannotRevert(
                f"the {self.name} of a {own_class(self.module).__name__} has changed since a norm "
                "was folded into it (trained, or loaded), and the two cannot be parted again; keep "
                "a copy of the model before folding"
            )
        if self.before is None:
            changes.parameters.append((self.module, self.name, None))
        elif own is not None:
            changes.writes.append((own, self.before.to(own)))
        elif self.parameter is not None:
            # It was out of reach of whatever moved the model since.
            self.parameter.data = self.before.to(self.module.get_parameter("weight"))
            changes.parameters.append((self.module, self.name, self.parameter))


@dataclass(frozen=True)
class KeptMean(KeptParameter):
    """One parameter that had a mean, which all who read what it makes subtract.

    So where it has changed since, it stays as it is: with the mean or without, nothing differs,
    unless what scales the channels behind it has changed, too.
    """

    @property
    def reaches_out(self) -> bool:
        """Others than the norm that it was kept for rely on how it is now."""
        return True

    def restore(self, changes: Changes, *, latest: bool) -> None:
        """Write its values, if it has not changed since."""
        own = self.module._parameters[self.name]
        if own is None or self.before is None or self.after is None:
            return
        if not latest or _same(own, self.after):
            changes.writes.append((own, self.before.to(own)))


@dataclass(frozen=True)
class KeptClass(Kept):
    """The class of a neighbour.

    Args:
        module: the neighbour.
        cls: its own class.
        mixin: what is put before that.
        before: what was put before that until then, or ``None``.
    """

    module: nn.Module
    cls: type[nn.Module]
    mixin: type[Mixin]
    before: type[Mixin] | None

    @property
    def thing(self) -> object:
        """The neighbour."""
        return id(self.module)

    def restore(self, changes: Changes, *, latest: bool) -> None:
        """Give it its class again."""
        if latest and type(self.module) is not remade(self.mixin, self.cls):
            raise CannotRevert(
                f"a {self.cls.__name__} has got another class since a conversion changed what it "
                "computes (a parametrization?); take that away first"
            )
        before = self.cls if self.before is None else remade(self.before, self.cls)
        changes.classes.append((self.module, before))

    @property
    def lapses(self) -> bool:
        """Whether it is of no use without the norm that it was made for."""
        return self.mixin.transparent


@dataclass(frozen=True)
class KeptActivation(Kept):
    """The activation behind a norm.

    Args:
        now: what is in its place, or in the place of its call.
        before: the activation, or ``None`` for a call in a forward.
    """

    now: nn.Module
    before: nn.Module | None

    @property
    def thing(self) -> object:
        """What is in its place."""
        return id(self.now)

    @property
    def stands_in(self) -> nn.Module:
        """What is in its place."""
        return self.now

    def restore(self, changes: Changes, *, latest: bool) -> None:
        """Put it in its place again, or have it called again."""
        if self.before is None:
            changes.lowered.append(self.now)
        else:
            self.before.training = self.now.training
            changes.modules.append((self.now, self.before))


def restore(model: nn.Module, kept: Iterable[Kept], changes: Changes) -> None:
    """Add to ``changes`` what brings things back.

    Args:
        model: what is reverted.
        kept: what was kept, in the order in which it was changed.
        changes: where the changes are collected.

    Raises:
        CannotRevert: something has changed since, and both cannot be had; or it lies outside.
    """
    last: set[object] = set()
    inside = {id(module) for module in model.modules()}
    for one in reversed(list(kept)):
        if one.stands_in is not None and id(one.stands_in) not in inside:
            raise CannotRevert(
                "a norm here took along the activation behind it, which lies outside of the part "
                "that is to be reverted; revert the whole model, or a part that has both"
            )
        if one.reaches_out and any(id(module) not in inside for module in one.written):
            raise CannotRevert(
                "an exact RMSNorm here reads a residual stream that goes beyond the part that is "
                "to be reverted; revert the whole model"
            )
        one.restore(changes, latest=one.thing not in last)
        last.add(one.thing)


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether values are what they were, up to a change of precision."""
    return now.is_meta or then.is_meta or torch.equal(now, then.to(now))
