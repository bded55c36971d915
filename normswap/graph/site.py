"""One normalization in a model, and all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from torch import nn

from normswap.graph.neighbours import Neighbourhood, Neighbours
from normswap.norms.state import NormState
from normswap.table import render

__all__ = ["NormSite", "Sites"]


@dataclass(frozen=True)
class NormSite:
    """One normalization in a model.

    Args:
        path: dotted path of the module, or of the module whose forward contains it; empty for
            the model itself.
        kind: its family: ``"batch_norm"``, ``"layer_norm"``, ``"group_norm"``,
            ``"instance_norm"``, ...
        origin: ``"module"``, ``"functional"`` or ``"handwritten"``.
        module: the module at ``path``.
        state: what was read from it.
        aliases: the other names under which the model has the same object.
        input_shapes: with example inputs, the input's shape at each call.
        obstacle: why it cannot be converted to anything; empty if it can.
    """

    path: str
    kind: str
    origin: Literal["module", "functional", "handwritten"]
    module: nn.Module = field(repr=False, compare=False)
    state: NormState = field(repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    obstacle: str = ""
    _neighbourhood: Neighbourhood | None = field(default=None, repr=False, compare=False)

    @property
    def num_features(self) -> int:
        """Number of channels, C."""
        return self.state.num_features

    @property
    def channel_dim(self) -> int:
        """Where the channels are in its input: 1, or -1 for token layouts."""
        return self.state.channel_dim

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of its input at the first call; ``None`` without example inputs or calls."""
        return self.input_shapes[0] if self.input_shapes else None

    @property
    def calls(self) -> int | None:
        """How often one forward calls it; ``None`` where neither inputs nor graph tell."""
        if self.input_shapes is not None:
            return len(self.input_shapes)
        return self._around.calls if self._around else None

    @property
    def activation(self) -> str | None:
        """The activation that is fused into it or alone reads its output: a path or a name."""
        for name in reversed(self.state.tail):
            if not isinstance(getattr(self.module, name), (nn.Identity, nn.Dropout)):
                return f"{self.path}.{name}".lstrip(".")
        return self._around.activation if self._around else None

    @property
    def producer(self) -> str | None:
        """Path of the convolution or linear that feeds it; ``None`` where no graph shows one."""
        return self._around.producer if self._around else None

    @property
    def order(self) -> int | None:
        """Its place in the order of calls; ``None`` where no graph shows it."""
        return self._around.order if self._around else None

    @property
    def names(self) -> tuple[str, ...]:
        """Path and aliases."""
        return (self.path, *self.aliases)

    @property
    def label(self) -> str:
        """How messages name it: path and class."""
        return f"{self.path or '(the model itself)'} ({type(self.module).__name__})"

    @property
    def _around(self) -> Neighbours | None:
        return self._neighbourhood.of(self.path) if self._neighbourhood else None


class Sites(Sequence[NormSite]):
    """The normalizations of a model, in the order of its modules; prints as a table."""

    def __init__(self, sites: Sequence[NormSite], neighbourhood: Neighbourhood) -> None:
        self._sites = tuple(sites)
        self._neighbourhood = neighbourhood

    @overload
    def __getitem__(self, index: int) -> NormSite: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> NormSite | Sites:
        """One site, or a slice of them as `Sites`."""
        if isinstance(index, slice):
            return Sites(self._sites[index], self._neighbourhood)
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[NormSite]:
        return iter(self._sites)

    @property
    def blind(self) -> dict[str, str]:
        """Why, by path, for modules that tracing could not follow; traces at the first call."""
        return dict(self._neighbourhood.trace.blind)

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        found: dict[str, int] = {}
        for site in self:
            found[site.kind] = found.get(site.kind, 0) + 1
        return found

    def __repr__(self) -> str:
        return f"<{len(self)} normalizations: {self.counts()}>"

    def __str__(self) -> str:
        return render(
            f"{len(self)} normalizations",
            ("path", "kind", "class", "C", "channels at", "fed by", "activation", "also called"),
            (
                (
                    site.path or "(the model itself)",
                    site.kind,
                    type(site.module).__name__,
                    site.num_features,
                    site.channel_dim,
                    site.producer or "",
                    site.activation or "",
                    ", ".join(site.aliases),
                )
                for site in self
            ),
        )
