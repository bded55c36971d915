"""A norm in plain torch as one of the registry: its class says how it starts and is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.norms.base import place
from normswap.norms.entry import AFFINE, BATCH_SOURCES, MOMENTUM, SYNC, NormEntry, Option
from normswap.norms.fidelity import Fidelity
from normswap.norms.plain import PlainNorm
from normswap.norms.pool import Rule
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import RUNNING_STATISTICS, Itself, NormState

__all__ = ["declared"]


def declared(
    cls: type[Any],
    *,
    name: str,
    aliases: tuple[str, ...],
    kind: str,
    axis: Literal["statistics", "standardization", "affine"],
    pooled: str,
    paper: str,
    options: tuple[Option, ...] = (),
    sources: frozenset[str] = BATCH_SOURCES,
    inputs: tuple[str, ...] = (),
    needs: Iterable[str] = (),
) -> NormEntry:
    """The entry of a norm in plain torch.

    Args:
        cls: its class, a `PlainNorm`; abstract if it has a variant for any options.
        name: the registry name.
        aliases: other names for it.
        kind: its family.
        axis: what it changes in BatchNorm.
        pooled: what its statistics are pooled over, in words.
        paper: citation, with arXiv id.
        options: those that it has alone; the class takes each as a keyword, and keeps it as an
            attribute of that name, unless it says otherwise (`PlainNorm.chosen`,
            `PlainNorm.settings`). One that has the name of an option of all takes its place.
        sources: families that it converts when ``where`` is not given.
        inputs: the names of its extra inputs.
        needs: what the starter must be told of the site, as for `NormEntry`.
    """
    norm = _Declared(cls, name, kind, options)
    return NormEntry(
        name=name,
        aliases=aliases,
        kind=kind,
        axis=axis,
        pooled=pooled,
        paper=paper,
        sources=sources,
        start=norm.start,
        reads={cls: norm.read},
        options=(*options, *norm.shared),
        inputs=inputs,
        needs=frozenset(needs),
    )


@dataclass(frozen=True)
class _Declared:
    cls: type[PlainNorm]
    name: str
    kind: str
    options: tuple[Option, ...]

    @property
    def shared(self) -> tuple[Option, ...]:
        """The options that it has with others."""
        cls = self.cls
        eps = () if cls.eps_option is None else (cls.eps_option,)
        sync, momentum = SYNC if cls.synchronizes else (), (MOMENTUM,) if cls.tracks else ()
        own = {option.name for option in self.options}
        return tuple(o for o in (*sync, *eps, *momentum, AFFINE) if o.name not in own)

    def start(self, state: NormState, *, carry: Carry = "auto", **given: Any) -> Start:
        """Answer how it starts; pure."""
        options = (*self.options, *self.shared)
        asked: dict[str, Any] = {
            option.name: option.default if given.get(option.name) is None else given[option.name]
            for option in options
        }
        affine = asked["affine"] if AFFINE in options else None
        own = {option.name: asked[option.name] for option in self.options}
        cls = self.cls.variant(**own)
        if affine is None and not (cls.usually_affine or state.affine or state.tracks):
            affine = False
        told = {"eps": state.eps, "momentum": state.momentum, "dim": state.dim}
        for option in self.shared:
            if option is not AFFINE and asked[option.name] is not None:
                told[option.name] = asked[option.name]
        make = partial(cls, state.num_features, **(told | cls.chosen(state, carry, **own)))
        with torch.device("meta"):
            sketch = make()
        shares = cls.tracks and not cls.retells
        running = shares and (state.tracks or state.kind != "batch_norm")

        def begun(source: NormState, rule: Rule) -> Start:
            return begin(
                source,
                partial(self._shell, state, make),
                rule,
                carry=carry,
                eps=None if cls.absorbs_eps else sketch.eps,
                affine=affine,
                running=running,
                note=sketch.note(state),
                counts=cls.counts,
                own=tuple(name for name, _ in sketch.named_parameters()),
                kept=partial(sketch.kept, state) if cls.retells else None,
            )

        if self._goes_on(state, sketch, carry) and state.itself is not None:
            terms = state.itself.terms
            same = replace(state, rule=state.itself.rule, counts=cls.counts, obstacle="")
            start = begun(same, _sketched(sketch, state, terms).pools(tracks=running))
            if start.fidelity.rank <= Fidelity.EVAL.rank:
                start = sketch.started(state, self._honest(state, sketch.eps, start))
                return replace(start, kept=partial(_kept, start.kept, terms))
            with torch.device("meta"):
                sketch = make()
        start = begun(state, sketch.pools(tracks=running))
        if cls.retells and not state.tracks:  # what it keeps begins anew
            start = replace(start, fidelity=start.fidelity.at_most(Fidelity.AFFINE))
        return sketch.started(state, self._honest(state, sketch.eps, start))

    def _goes_on(self, state: NormState, sketch: PlainNorm, carry: Carry) -> bool:
        """Whether the source is such a norm, all whose own tensors fit into the new one."""
        if state.norm != self.name or state.itself is None or carry == "fresh":
            return False
        theirs, ours = (
            {name: tensor.shape for name, tensor in terms.items()}
            for terms in (state.itself.terms, _terms(sketch))
        )
        return bool(theirs) and theirs == ours

    def _honest(self, state: NormState, eps: float, start: Start) -> Start:
        """No more promised than in eval mode, where what is kept makes up for another eps."""
        most = Fidelity.EVAL if self.cls.absorbs_eps and eps != state.eps else Fidelity.EXACT
        return replace(start, fidelity=start.fidelity.at_most(most))

    @staticmethod
    def _shell(state: NormState, make: partial[PlainNorm]) -> nn.Module:
        module = make().to(state.reference())
        module.reset_parameters()
        place(module, state)
        module.settle(state)
        return module

    def read(self, module: nn.Module) -> NormState:
        """Read one of its modules."""
        if not isinstance(module, self.cls):
            raise TypeError(f"expected a {self.cls.__name__}, got {type(module).__name__}")
        held = tensors(module)
        held["rule"] = module.pools(tracks=held["running_mean"] is not None)
        affine = held["weight"] is not None
        shared = {
            option.name: affine if option is AFFINE else getattr(module, option.name)
            for option in self.shared
        }
        told: dict[str, Any] = {"kind": self.kind, "counts": self.cls.counts, **held}
        told |= {**layout(module), **module.retold()}
        return NormState(
            norm=self.name,
            num_features=module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            dim=module.dim,
            settings=module.settings(option.name for option in self.options) | shared,
            obstacle=module.obstacle(),
            itself=Itself(held["rule"], _terms(module)),
            retold=self.cls.retells,
            **told,
        )


def _terms(norm: PlainNorm) -> dict[str, Tensor]:
    """The tensors that mean something to a norm only; none where a layer of its own has some."""
    layers = [
        layer for name, layer in norm._modules.items() if layer is not None and name in norm.own
    ]
    if any(next(layer.parameters(), None) is not None for layer in layers):
        return {}
    names = (*norm.own, *RUNNING_STATISTICS) if norm.retells else norm.own
    held = {name: getattr(norm, name, None) for name in names}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _sketched(sketch: PlainNorm, state: NormState, terms: Mapping[str, Tensor]) -> PlainNorm:
    """A sketch of a norm with the numbers that it will have."""
    numbers = {"weight": state.weight, "bias": state.bias, **terms}
    for name, value in numbers.items():
        if value is None:
            continue
        if name in sketch._parameters:
            value = value.detach()
            sketch._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            sketch._buffers[name] = value
    return sketch


def _kept(
    kept: Callable[[], Mapping[str, Tensor]], terms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a start keeps, and copies of the source's own tensors; what was held fixed stays so."""
    copies = {name: value.detach().clone() for name, value in terms.items()}
    fixed = {
        name: nn.Parameter(copies[name], requires_grad=False)
        for name, value in terms.items()
        if isinstance(value, nn.Parameter) and not value.requires_grad
    }
    return {**kept(), **copies, **fixed}
