"""A converted norm and its original, each in a copy of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.copying import sharing_copy
from normswap.norms.state import RUNNING_STATISTICS
from normswap.stats.calibration.candidates import Candidate, affine_of
from normswap.stats.feed import Feed, mapped
from normswap.stats.shelf import Holder
from normswap.swap.apply import revert
from normswap.swap.journal import records

__all__ = ["Example", "Pair", "copies"]


@dataclass(frozen=True)
class Example:
    """A batch, and what the original model returns for it.

    Args:
        batch: the batch.
        output: what the original model returns for it.
        holder: whose both are: they are in memory while they work.
    """

    batch: Any
    output: Any
    holder: Holder

    def fed_to(self, model: nn.Module, feed: Feed) -> Any:
        """Run a model on the batch, of which it gets a copy; return what it returns."""
        with self.holder.watch:  # what other forwards have left on the model may be put aside
            return feed.run(model, mapped(self.batch, Tensor.clone))


@dataclass(frozen=True)
class Pair:
    """A converted norm and its original, each in a copy of the model.

    Args:
        path: where both are.
        num_features: channels, C.
        channel_dim: where the channels are in their inputs.
        norm: the converted one, whose tensors are the copy's own.
        original: the original.
        needs_statistics: whether the converted one's running statistics are to be measured too.
    """

    path: str
    num_features: int
    channel_dim: int
    norm: Any
    original: nn.Module
    needs_statistics: bool

    @cached_property
    def affine(self) -> dict[str, Tensor]:
        """The converted norm's gain and, if it has one, its offset."""
        return affine_of(self.norm)

    @cached_property
    def fitted(self) -> dict[str, Tensor]:
        """All that data decides: the affine, and running statistics if they are needed."""
        names = RUNNING_STATISTICS if self.needs_statistics else ()
        kept = {name: getattr(self.norm, name, None) for name in names}
        return self.affine | {name: t for name, t in kept.items() if isinstance(t, Tensor)}

    def write(self, gain: Tensor, offset: Tensor) -> None:
        """Give the converted norm an affine."""
        with torch.no_grad():
            self.affine["weight"].copy_(gain)
            if "bias" in self.affine:
                self.affine["bias"].copy_(offset)

    def aim(self, y: Tensor) -> Tensor:
        """What the converted norm is to compute where the original norm computes y.

        That is an activation further, where the converted norm stands for it too.
        """
        name = getattr(self.norm, "stands_for", "")
        return getattr(self.norm, name)(y.clone()) if name else y

    def bare(self, x: Tensor) -> Tensor:
        """What the converted norm computes without its affine and without its fused activation.

        Its affine has to be written anew afterwards.
        """
        self.write(torch.ones_like(self.affine["weight"]), torch.zeros_like(self.affine["weight"]))
        tail = getattr(self.norm, "tail", ())
        self.norm.tail = ()
        try:
            y: Tensor = self.norm.forward(x)
        finally:
            self.norm.tail = tail
        return y


def copies(model: nn.Module, chosen: list[Candidate]) -> tuple[nn.Module, nn.Module, list[Pair]]:
    """The converted and the original model, each a copy in eval mode, with the norms to compare.

    Args:
        model: the converted model, which is not touched.
        chosen: the norms to compare.

    Returns:
        The converted model, the original model, and the pairs.
    """
    fitted = (tensor for each in chosen for tensor in each.affine.values())
    converted = sharing_copy(model, fitted).eval()
    original = revert(sharing_copy(model, _reverted(model))).eval()
    here = dict(converted.named_modules(remove_duplicate=False))
    there = dict(original.named_modules(remove_duplicate=False))
    pairs = [
        Pair(
            each.path,
            each.site.num_features,
            each.site.channel_dim,
            here[each.path],
            there[each.path],
            each.needs_statistics,
        )
        for each in chosen
    ]
    return converted, original, pairs


def _reverted(model: nn.Module) -> list[Tensor]:
    """The parameters that a revert would write to."""
    found: list[Tensor] = []
    for norm, record in records(model).values():
        for module in (norm, record.original, *(m for kept in record.beside for m in kept.written)):
            found += module.parameters()
            found += list(affine_of(module).values())
    return found
