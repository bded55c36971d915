"""What a pass has seen so far: everything that is needed to go on, or to finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from normswap.stats.abreast import Abreast
from normswap.stats.accumulate import Accumulator
from normswap.stats.convergence import Convergence

__all__ = ["Gathered"]


@dataclass
class Gathered:
    """What a pass has seen so far.

    Args:
        make: makes the accumulator of a name.
        accumulators: by name, mostly a norm's path.
        rows: what adds to several accumulators at once, and brings them up to date when asked.
        batches: batches that counted.
        samples: samples that counted.
        left_out: the numbers of batches that do not count because of values that are not finite.
        passes: how often the loader was read.

    Attributes:
        convergence: how well the statistics are known.
    """

    make: Callable[[str], Accumulator]
    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    rows: Sequence[Abreast] = ()
    batches: int = 0
    samples: int = 0
    left_out: list[int] = field(default_factory=list)
    passes: int = 1
    convergence: Convergence = field(init=False)

    def __post_init__(self) -> None:
        self.convergence = Convergence(self.rows)

    def of(self, name: str) -> Accumulator:
        """The accumulator of a name."""
        if name not in self.accumulators:
            self.accumulators[name] = self.make(name)
        return self.accumulators[name]

    def count(self, index: int, samples: int, *, kept: bool) -> None:
        """Count a batch, or leave it out."""
        if kept:
            self.batches += 1
            self.samples += samples
        else:
            self.left_out.append(index)

    def settle(self) -> None:
        """Bring the accumulators up to date."""
        for row in self.rows:
            row.settle()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All there is to remember: tensors by name, and what JSON can hold."""
        self.settle()
        tensors, convergence = self.convergence.state()
        tensors = {f"convergence.{name}": tensor for name, tensor in tensors.items()}
        for name, each in self.accumulators.items():
            tensors[f"seen.{name}.weight"] = each.weight
            tensors[f"seen.{name}.mean"] = each.mean
            tensors[f"seen.{name}.spread"] = each.spread
        return tensors, {
            "calls": {name: each.calls for name, each in self.accumulators.items()},
            "batches": self.batches,
            "samples": self.samples,
            "left_out": self.left_out,
            "convergence": convergence,
        }

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Be as `state` was."""
        for name, calls in notes["calls"].items():
            each = self.of(name)
            each.calls = calls
            each.weight = tensors[f"seen.{name}.weight"].to(each.weight.device)
            each.mean = tensors[f"seen.{name}.mean"].to(each.mean.device)
            each.spread = tensors[f"seen.{name}.spread"].to(each.spread.device)
        self.batches, self.samples = notes["batches"], notes["samples"]
        self.left_out = notes["left_out"]
        for row in self.rows:
            row.take()
        self.convergence.restore(
            {
                name.removeprefix("convergence."): tensor
                for name, tensor in tensors.items()
                if name.startswith("convergence.")
            },
            notes["convergence"],
        )
