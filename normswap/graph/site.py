"""One normalization in a model, and all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from normswap.graph.neighbours import Neighbourhood, Neighbours
from normswap.norms.functional import FunctionalNorm
from normswap.norms.state import NormState
from normswap.table import Listing

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
        module: the module at ``path``; for a functional norm what stands for its call.
        owner: for a functional norm, the module at ``path``, whose forward has the call.
        state: what was read from it.
        aliases: the other names under which the model has the same object.
        input_shapes: with example inputs, the input's shape at each call.
        obstacle: why it cannot be converted to anything; empty if it can.
        recognised: how it was recognised, if not by its class.
        unready: whether it has no weights to speak of yet, or no longer: lazy or quantized.
    """

    path: str
    kind: str
    origin: Literal["module", "functional", "handwritten"]
    module: nn.Module = field(repr=False, compare=False)
    state: NormState = field(repr=False, compare=False)
    owner: nn.Module | None = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    obstacle: str = ""
    unready: bool = False
    recognised: str = ""
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
        return self.around.calls if self.around else None

    @property
    def certainly_once(self) -> bool:
        """Whether every forward calls it exactly once, as one graph of the whole model shows."""
        known = self._neighbourhood is not None and not self._neighbourhood.blind
        return known and self.calls == 1

    @property
    def activation(self) -> str | None:
        """The activation that is fused into it or alone reads its output: a path or a name."""
        for name, behind in reversed(self.state.behind(self.module).items()):
            if not isinstance(behind, (nn.Identity, nn.Dropout)):
                return f"{self.path}.{name}".lstrip(".")
        return self.around.activation if self.around else None

    @property
    def producer(self) -> str | None:
        """Path of the convolution or linear that feeds it; ``None`` where no graph shows one."""
        return self.around.producer if self.around else None

    @property
    def around(self) -> Neighbours | None:
        """All that a graph shows of its surroundings; ``None`` where none shows it."""
        return self._neighbourhood.of(self.path) if self._neighbourhood else None

    def neighbourhood_calls(self, module: nn.Module) -> int:
        """How often one forward calls another module of the model, as far as graphs tell."""
        return self._neighbourhood.calls(module) if self._neighbourhood else 0

    def read_elsewhere(self, path: str) -> bool:
        """Whether a forward reads tensors of another module of the model without calling it."""
        return self._neighbourhood is not None and self._neighbourhood.reads(path)

    @property
    def order(self) -> int | None:
        """Its place in the order of calls; ``None`` where no graph shows it."""
        return self.around.order if self.around else None

    @property
    def names(self) -> tuple[str, ...]:
        """Path and aliases."""
        return (self.path, *self.aliases)

    @property
    def label(self) -> str:
        """How messages name it: path and class."""
        return f"{self.path or '(the model itself)'} ({self.source})"

    @property
    def source(self) -> str:
        """What it is in the code: a class, or a function and its line."""
        called = self.module if isinstance(self.module, FunctionalNorm) else None
        return called.function if called else type(self.module).__name__


class Sites(Listing[NormSite]):
    """The normalizations of a model, in the order of its modules; prints as a table.

    Attributes:
        unrecognised: by path, modules that look like norms and could not be confirmed as such,
            with the reason. They are left alone.
    """

    title = "Normalizations"
    columns = ("path", "kind", "class", "C", "channels at", "fed by", "activation", "also called")

    def __init__(
        self,
        sites: Iterable[NormSite],
        neighbourhood: Neighbourhood,
        unrecognised: Mapping[str, str],
    ) -> None:
        super().__init__(sites)
        self._neighbourhood = neighbourhood
        self.unrecognised = dict(unrecognised)

    @property
    def blind(self) -> dict[str, str]:
        """Why, by path, for modules that could not be followed; traces at the first call.

        After a run on example inputs, those that were given what nothing seen has made.
        """
        return {**self._neighbourhood.blind, **self._neighbourhood.unseen}

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(Counter(site.kind for site in self))

    def summary(self) -> str:
        """How many there are, of what, and what was told by behaviour."""
        of_each = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        lines = [f"{len(self)} normalizations" + (f": {of_each}" if of_each else "")]
        told = {f"{site.source} {site.recognised}" for site in self if site.recognised}
        left = {f"not recognised: {reason}" for reason in self.unrecognised.values()}
        return "\n".join([*lines, *sorted(told), *sorted(left)])

    def cells(self, item: NormSite) -> tuple[object, ...]:
        """One site as a row."""
        return (
            item.path or "(the model itself)",
            item.kind,
            item.source,
            item.num_features,
            item.channel_dim,
            item.producer or "",
            item.activation or "",
            ", ".join(item.aliases),
        )
