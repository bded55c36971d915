"""What is to happen to one site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.spec import Target
from normswap.norms.start import Start
from normswap.norms.state import NormState

__all__ = ["Action", "Step"]

Action = Literal["convert", "already", "skip", "leave"]


@dataclass(frozen=True)
class Step:
    """What is to happen to one site.

    Args:
        site: the normalization.
        action: ``"convert"``; ``"already"``: it is what was asked for; ``"skip"``: it was chosen
            but cannot be converted; ``"leave"``: it was not chosen.
        to: what it is to become.
        start: how, if it is to be converted.
        state: the site's state, completed from its surroundings, that the start was made for.
        reason: why it is skipped or left.
    """

    site: NormSite
    action: Action
    to: Target | None = None
    start: Start | None = None
    state: NormState | None = None
    reason: str = ""

    @property
    def fidelity(self) -> Fidelity | None:
        """How faithful the outcome is; ``None`` where nothing is asked of the site."""
        if self.action == "already":
            return Fidelity.EXACT
        return self.start.fidelity if self.start else None

    @property
    def note(self) -> str:
        """What there is to say about it."""
        return self.reason or (self.start.note if self.start else "")
