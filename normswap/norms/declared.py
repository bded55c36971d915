"""A norm by a rule as one of the registry: how it starts and is read follows from its class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from normswap.norms.base import place
from normswap.norms.batch import BATCH_SOURCES, MOMENTUM
from normswap.norms.entry import AFFINE, EPS, NormEntry, Option, flag
from normswap.norms.measured import MeasuredNorm
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["declared"]

_SYNC = (
    flag("sync", False, "pool the batch over all ranks; DDP takes it on CPU too"),
    Option("process_group", None, "the ranks that share statistics; None: all"),
)


def declared(
    cls: type[MeasuredNorm],
    *,
    name: str,
    aliases: tuple[str, ...],
    kind: str,
    axis: Literal["statistics", "standardization", "affine"],
    pooled: str,
    paper: str,
    options: tuple[Option, ...] = (),
) -> NormEntry:
    """The entry of a norm by a rule.

    Args:
        cls: its class.
        name: the registry name.
        aliases: other names for it.
        kind: its family.
        axis: what it changes in BatchNorm.
        pooled: what its statistics are pooled over, in words.
        paper: citation, with arXiv id.
        options: those that it has alone; the class takes each as a keyword, and keeps it as an
            attribute of that name.
    """
    norm = _Declared(cls, name, kind, options)
    return NormEntry(
        name=name,
        aliases=aliases,
        kind=kind,
        axis=axis,
        pooled=pooled,
        paper=paper,
        sources=BATCH_SOURCES,
        start=norm.start,
        reads={cls: norm.read},
        options=(*options, *norm.shared),
    )


@dataclass(frozen=True)
class _Declared:
    cls: type[MeasuredNorm]
    name: str
    kind: str
    options: tuple[Option, ...]

    @property
    def shared(self) -> tuple[Option, ...]:
        """The options that it has with others."""
        sync = _SYNC if self.cls.synchronizes else ()
        return (*sync, EPS, *((MOMENTUM,) if self.cls.tracks else ()), AFFINE)

    def start(self, state: NormState, *, carry: Carry = "auto", **given: Any) -> Start:
        """Answer how it starts; pure."""
        settings: dict[str, Any] = {
            option.name: option.default if given.get(option.name) is None else given[option.name]
            for option in (*self.options, *self.shared)
        }
        own: dict[str, Any] = {option.name: settings[option.name] for option in self.options}
        running = self.cls.tracks and (state.tracks or state.kind != "batch_norm")
        made = self.cls(state.num_features, **own)
        return begin(
            state,
            partial(self._shell, state, own, settings),
            made.pools(tracks=running),
            carry=carry,
            eps=settings["eps"],
            affine=settings["affine"],
            running=running,
            counts=self.cls.counts,
            own=tuple(name for name, _ in made.named_parameters()),
        )

    def _shell(self, state: NormState, own: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
        module = self.cls(state.num_features, **own).to(state.reference())
        for name in ("eps", "momentum"):
            value = settings.get(name)
            setattr(module, name, getattr(state, name) if value is None else value)
        if self.cls.synchronizes:
            module.sync, module.process_group = settings["sync"], settings["process_group"]
        module.dim = state.dim
        return place(module, state)

    def read(self, module: nn.Module) -> NormState:
        """Read one of its modules."""
        if not isinstance(module, self.cls):
            raise TypeError(f"expected a {self.cls.__name__}, got {type(module).__name__}")
        given = tensors(module)
        affine = given["weight"] is not None
        return NormState(
            norm=self.name,
            kind=self.kind,
            num_features=module.num_features,
            rule=module.pools(tracks=given["running_mean"] is not None),
            eps=module.eps,
            momentum=module.momentum,
            dim=module.dim,
            settings={
                option.name: affine if option is AFFINE else getattr(module, option.name)
                for option in (*self.options, *self.shared)
            },
            counts=self.cls.counts,
            obstacle=module.obstacle(),
            **given,
            **layout(module),
        )
