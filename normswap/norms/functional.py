"""A functional norm as a source: a call in somebody's forward, with tensors of the owner's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from normswap.norms.renamed import look_through, names_of, per_channel, whole
from normswap.norms.state import NormState

__all__ = [
    "FunctionalNorm",
    "child_name",
    "own_for_a_while",
    "owner_of",
    "read_functional",
    "recall",
    "refer",
    "refer_again",
    "referred",
    "refresh",
]

_REFERS = "_normswap_refers"
_OWNER = "_normswap_owner"


class FunctionalNorm(nn.Module):
    """Stands for a call of a norm function; never a part of a model.

    Args:
        function: the call in words, for messages.
        name: the name that a norm put in its place has in the owner.
        state: what the call computes.
        refers: for each tensor that it is given, the attribute of the owner that holds it.
    """

    def __init__(
        self, function: str, name: str, state: NormState, refers: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.function = function
        self.name = name
        self.refers = dict(refers)
        #: whether it is one call, or a norm written out
        self.origin: Literal["functional", "handwritten"] = "functional"
        #: whether the forward reads one of the tensors elsewhere too
        self.shared = False
        for tensor in refers:
            vars(self)[tensor] = whole(getattr(state, tensor))
        tensors: dict[str, Any] = {tensor: vars(self)[tensor] for tensor in refers}
        self._read = replace(state, **tensors)

    @property
    def state(self) -> NormState:
        """What the call computes, with the tensors that the owner has now."""
        tensors: dict[str, Any] = {name: per_channel(vars(self)[name]) for name in self.refers}
        return replace(self._read, **tensors)


def read_functional(module: nn.Module) -> NormState:
    """Read what stands for a call."""
    if not isinstance(module, FunctionalNorm):
        raise TypeError(f"expected a FunctionalNorm, got {type(module).__name__}")
    return module.state


def child_name(kind: str, index: int) -> str:
    """The name that the norm in the place of a forward's call has in the owner."""
    return f"functional_{kind}_{index}"


def refer(norm: nn.Module, attributes: Mapping[str, str], owner: nn.Module) -> None:
    """Let a norm refer to tensors that stay its owner's, under the owner's keys.

    Args:
        norm: a norm that holds them as its own until now.
        attributes: for each of its tensors that is the owner's, the owner's attribute.
        owner: the module that holds them.
    """
    vars(norm)[_REFERS] = dict(attributes)
    vars(norm)[_OWNER] = owner  # no child: a plain reference, right in copies and pickles
    for name in attributes:
        held = norm._parameters if name in norm._parameters else norm._buffers
        vars(norm)[name] = held.pop(name)
    odd = {name: f"_{name}_of_owner" for name in attributes if _is_odd(owner, attributes[name])}
    look_through(norm, odd)
    for name in odd:
        del vars(norm)[name]
    refresh(norm)


def referred(norm: nn.Module) -> dict[str, str]:
    """What a norm refers to: its tensors' names with the owner's attributes."""
    return dict(vars(norm).get(_REFERS, {}))


def owner_of(norm: nn.Module) -> nn.Module | None:
    """The module whose tensors a norm refers to, or ``None``."""
    return vars(norm).get(_OWNER)


def own_for_a_while(norm: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Let a norm have tensors of its own instead of those that it refers to.

    Args:
        norm: the norm.
        names: of the tensors that it is to have itself until `refer_again`.

    Returns:
        What it referred to before, for `refer_again`.
    """
    before = referred(norm)
    if before:
        vars(norm)[_REFERS] = {k: v for k, v in before.items() if k not in names}
        for name in before.keys() & set(names):
            norm._buffers[name] = vars(norm).pop(name)
    return before


def refer_again(norm: nn.Module, before: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Undo `own_for_a_while`: refer to the owner's tensors again."""
    if before:
        vars(norm)[_REFERS] = dict(before)
        for name, tensor in tensors.items():
            norm._buffers.pop(name, None)
            vars(norm)[name] = tensor


def refresh(norm: nn.Module) -> None:
    """Let a norm hold the tensors that its owner holds now: a move may have replaced them.

    A norm that has no owner is left alone.
    """
    owner = owner_of(norm)
    if owner is None:
        return
    places = names_of(norm)
    for name, attribute in referred(norm).items():
        tensor = attrgetter(attribute)(owner)
        if tensor is None or isinstance(tensor, Tensor):  # and not what a tracer puts there
            vars(norm)[places.get(name, name)] = tensor


def _is_odd(owner: nn.Module, attribute: str) -> bool:
    """Whether a tensor has one value for each channel, in another shape than (C,)."""
    tensor = attrgetter(attribute)(owner)
    return isinstance(tensor, Tensor) and per_channel(tensor) is not tensor


def recall(stub: FunctionalNorm, owner: nn.Module) -> None:
    """Let what stands for a call hold the tensors that the owner holds now."""
    for name, attribute in stub.refers.items():
        vars(stub)[name] = attrgetter(attribute)(owner)
