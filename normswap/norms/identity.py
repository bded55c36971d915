"""No normalization at all, in the place of one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from normswap.norms.base import Norm, place
from normswap.norms.entry import ANY_SOURCE, NormEntry
from normswap.norms.pool import NOTHING, Rule
from normswap.norms.reading import layout
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState, fresh_state

__all__ = ["ENTRIES", "Identity"]


class Identity(Norm, nn.Identity):
    """Passes its input on, and runs the tail that the replaced layer had.

    It remembers what a norm put here later has to know, and an empty buffer follows the model's
    device and dtype for it.
    """

    own = ("like",)
    like: Tensor

    def __init__(self, num_features: int, dim: int | None = None, like: Tensor | None = None):
        super().__init__()
        self.num_features = num_features
        self.dim = dim
        empty = torch.empty(0) if like is None else like.detach().new_empty(0)
        self.register_buffer("like", empty, persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """Hand on a copy: an activation in place behind it must not reach what went in."""
        return x.clone()

    def extra_repr(self) -> str:
        """Say how many channels pass."""
        return f"{self.num_features}"


def read_identity(module: nn.Module) -> NormState:
    """Read an Identity that stands in the place of a norm."""
    if not isinstance(module, Identity):
        raise TypeError(f"expected normswap's Identity, got {type(module).__name__}")
    fresh = fresh_state(module.num_features, dim=0, like=module.like)
    return replace(fresh, norm="identity", kind="identity", dim=module.dim, **layout(module))


def start_identity(state: NormState, *, carry: Carry = "auto") -> Start:
    """Start an Identity; nothing of the source is left in it."""

    def shell() -> nn.Module:
        return place(Identity(state.num_features, state.dim, state.reference()), state)

    return begin(state, shell, Rule.always(NOTHING), carry=carry, affine=False)


ENTRIES = (
    NormEntry(
        name="identity",
        aliases=("none", "no_norm"),
        kind="identity",
        axis="none",
        pooled="nothing",
        paper="",
        sources=ANY_SOURCE,
        start=start_identity,
        reads={Identity: read_identity},
    ),
)
