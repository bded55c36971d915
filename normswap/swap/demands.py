"""What a whole plan must live up to before it may be applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from normswap.errors import NothingToConvert, OptionError, TooUnfaithful
from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.spec import Target
from normswap.swap.plan import Plan
from normswap.swap.step import Step

__all__ = ["refuse_empty", "refuse_idle", "refuse_unfaithful"]


def refuse_empty(sites: Sequence[NormSite], to: object) -> None:
    """Raise `NothingToConvert` if the model has no normalization at all."""
    if not sites:
        raise NothingToConvert(
            f"nothing to convert to {_told(to)}: the model has no normalization that normswap knows"
        )


def refuse_idle(plan: Plan, to: object) -> None:
    """Raise `NothingToConvert` if no site is left to convert, saying what the model has."""
    if plan.of("convert", "already") or not plan:
        return
    skipped = plan.of("skip")
    if skipped:
        raise NothingToConvert(
            f"not one of the chosen normalizations can become {_told(to)}:\n" + _listed(skipped)
        )
    counts = Counter(step.site.kind for step in plan)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    first = next(iter(counts))
    raise NothingToConvert(
        f"nothing to convert to {_told(to)}: the model has {kinds}. Select what to convert, for "
        f'instance where="kind:{first}", or where="*" for everything'
    )


def refuse_unfaithful(plan: Plan, *, strict: bool, min_fidelity: str | Fidelity | None) -> None:
    """Raise `TooUnfaithful` if strict and a site is skipped, or one would be less faithful."""
    least = None if min_fidelity is None else _named(min_fidelity)
    skipped = plan.of("skip") if strict else []
    if skipped:
        raise TooUnfaithful(
            "some of the chosen normalizations cannot be converted:\n" + _listed(skipped)
        )
    if least is None:
        return
    worse = [step for step in plan if step.fidelity and step.fidelity.rank > least.rank]
    if worse:
        raise TooUnfaithful(
            f"min_fidelity={least.value!r} cannot be kept; leave these out by skip=, "
            "or accept less:\n" + _listed(worse)
        )


def _told(to: object) -> str:
    """What was asked for, for people."""
    if isinstance(to, type):
        return to.__name__
    return str(to) if isinstance(to, (str, Target)) else "what was asked"


def _named(name: str | Fidelity) -> Fidelity:
    try:
        return Fidelity(name)
    except ValueError:
        names = ", ".join(fidelity.value for fidelity in Fidelity)
        raise OptionError(f"min_fidelity={name!r} is none of {names}") from None


def _listed(steps: list[Step], most: int = 8) -> str:
    lines = [
        f"  {step.site.label}: {step.reason or f'only {step.fidelity}'}" for step in steps[:most]
    ]
    if len(steps) > most:
        lines.append(f"  ... and {len(steps) - most} more")
    return "\n".join(lines)
