"""Which norms a statistics pass is about, and why the others are not."""

from __future__ import annotations

from typing import Any

from torch import nn

from normswap.errors import StatisticsError
from normswap.graph.modules import find
from normswap.graph.site import NormSite
from normswap.norms.measured import MeasuredNorm
from normswap.norms.pool import Curve
from normswap.swap.select import Selector, select

__all__ = ["choose"]


def choose(model: nn.Module, where: Selector | None) -> tuple[list[NormSite], dict[str, str]]:
    """Choose the norms whose running statistics are to be estimated.

    In a model that is in eval mode throughout these are all that keep running statistics. In one
    that is training, a norm in eval mode is held frozen by its owner, and left alone, as are
    `FrozenBatchNorm` and ``momentum=0``. ``where`` overrides.

    Returns:
        The chosen sites, and by path why the others that keep statistics are left.

    Raises:
        StatisticsError: no norm is chosen.
        NothingMatched: ``where`` matches nothing.
    """
    keepers = [site for site in find(model) if _keeps(site)]
    if not keepers:
        raise StatisticsError(
            "no normalization of the model keeps running statistics, so there is nothing to "
            "estimate; print(normswap.find(model)) shows what it has"
        )
    if where is not None:
        chosen = select(where, keepers, "where")
        for site in chosen:
            if not _updates(site):
                reason = _reason_to_leave(site, training=False)
                raise StatisticsError(f"{site.label}: {reason}; or leave it out of where=")
        return chosen, {site.path: "not in where=" for site in keepers if site not in chosen}
    training = any(site.module.training for site in keepers if _updates(site))
    chosen, left = [], {}
    for site in keepers:
        reason = _reason_to_leave(site, training=training)
        if reason:
            left[site.path] = reason
        else:
            chosen.append(site)
    if not chosen:
        raise StatisticsError(
            "every normalization that keeps running statistics is frozen: "
            + "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:4])
            + "; choose by where="
        )
    return chosen, left


def _keeps(site: NormSite) -> bool:
    """Whether the norm keeps statistics of its input, be it not a mean and a variance."""
    evaluates = site.state.rule.eval
    plain = isinstance(evaluates, Curve) and evaluates.linear
    return site.state.tracks or (site.state.retold and not plain)


def _updates(site: NormSite) -> bool:
    """Whether the norm's class ever updates running statistics that a pass can write."""
    module: Any = site.module
    if _only_trained(site):
        return False
    return site.state.rule.train.measures and hasattr(module, "momentum")


def _only_trained(site: NormSite) -> bool:
    """Whether a mean and a variance do not tell what the norm keeps."""
    if isinstance(site.module, MeasuredNorm):
        return not site.module.measurable
    return site.state.retold


def _reason_to_leave(site: NormSite, *, training: bool) -> str:
    if site.owner is not None:
        return 'a call in a forward: convert it, say to "sync_bn", to have it measured'
    if _only_trained(site):
        return "keeps more than a mean and a variance, so that only training updates it"
    if not _updates(site):
        return 'frozen by its class, and measures nothing until it is converted to "bn"'
    if not getattr(site.module, "track_running_stats", True):
        return "frozen by track_running_stats=False"
    if site.state.momentum == 0:
        return "frozen by momentum=0"
    if training and not site.module.training:
        return "frozen: in eval mode while others train"
    return ""
