"""What is to happen to every normalization of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from normswap.swap.apply import apply_steps
from normswap.swap.step import Action, Step
from normswap.table import Listing

__all__ = ["Plan"]


class Plan(Listing[Step]):
    """What is to happen to every normalization of a model, in order; prints as a table.

    ``apply()`` makes it happen.
    """

    title = "Plan"
    columns = ("path", "from", "action", "to", "fidelity", "note")

    def __init__(self, model: nn.Module, steps: Iterable[Step]) -> None:
        super().__init__(steps)
        self.model = model

    def of(self, *actions: Action) -> list[Step]:
        """The steps with one of these actions."""
        return [step for step in self if step.action in actions]

    def apply(self) -> nn.Module:
        """Make it happen: all of it, or on any exception nothing.

        Returns:
            The model, or its replacement where the model itself is a norm.

        Raises:
            StalePlan: the model's norms are no longer those that the plan was made for.
        """
        return apply_steps(self.model, self).model

    def summary(self) -> str:
        """How many steps there are of each action."""
        counts = Counter(step.action for step in self)
        return ", ".join(f"{count} {action}" for action, count in counts.items())

    def cells(self, item: Step) -> tuple[object, ...]:
        """One step as a row."""
        return (
            item.site.path or "(the model itself)",
            item.site.source,
            item.action,
            item.to or "",
            item.fidelity or "",
            item.note,
        )
