"""Which converted norms can be fitted, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.errors import StatisticsError
from normswap.graph.modules import find, read_site
from normswap.graph.site import NormSite
from normswap.norms.fidelity import Fidelity
from normswap.norms.functional import FunctionalNorm
from normswap.swap.journal import Record, record_of
from normswap.swap.select import Selector, select

__all__ = ["Candidate", "candidates"]


@dataclass(frozen=True)
class Candidate:
    """A converted norm whose affine can be fitted.

    Args:
        site: where it is.
        record: what it replaced.
    """

    site: NormSite
    record: Record

    @property
    def path(self) -> str:
        """Where it is."""
        return self.site.path

    @property
    def affine(self) -> dict[str, Tensor]:
        """Its gain and, if it has one, its offset: the model's own tensors, by name."""
        return affine_of(self.site.module)

    @property
    def needs_statistics(self) -> bool:
        """Whether it keeps running statistics that its original had none to give."""
        state = self.site.state
        return state.tracks and not state.retold and "running_mean" not in self.record.carried


def affine_of(norm: nn.Module) -> dict[str, Tensor]:
    """A norm's weight and bias, as far as it has them."""
    found = {name: getattr(norm, name, None) for name in ("weight", "bias")}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def candidates(model: nn.Module, where: Selector | None) -> tuple[list[Candidate], dict[str, str]]:
    """The converted norms that are to be fitted.

    Args:
        model: a converted model.
        where: which; ``None`` for those that are less faithful than in eval mode.

    Returns:
        The candidates in the order of the model's modules, and by path why other converted norms
        are left.

    Raises:
        StatisticsError: no norm of the model was converted.
        NothingMatched: ``where`` matches nothing.
    """
    converted = [
        Candidate(site, record)
        for site in find(model)
        if (record := record_of(site.module)) is not None
    ]
    if not converted:
        raise StatisticsError(
            "no normalization of the model was converted, so there is nothing to fit; call "
            "normswap.convert first"
        )
    chosen = converted
    left: dict[str, str] = {}
    if where is not None:
        selected = {site.path for site in select(where, [c.site for c in converted], "where")}
        chosen = [each for each in converted if each.path in selected]
        left = {each.path: "not in where=" for each in converted if each.path not in selected}
    owners = Counter(
        id(tensor) for module in model.modules() for tensor in affine_of(module).values()
    )
    found = []
    for each in chosen:
        reason = _obstacle(each, owners)
        if not reason and where is None and each.record.fidelity.rank <= Fidelity.NEAR.rank:
            reason = f"{each.record.fidelity} already"
        if reason:
            left[each.path] = reason
        else:
            found.append(each)
    return found, left


def _obstacle(each: Candidate, owners: Counter[int]) -> str:
    """Why a norm cannot be fitted; empty if it can."""
    affine = each.affine
    if isinstance(each.record.original, FunctionalNorm):
        return "its original is a call in a forward, whose output nothing shows"
    if read_site(each.record.original, each.path).state.within:
        return "its original is a norm and an activation in one, whose norm alone nothing shows"
    if "weight" not in affine:
        return "it has no gain to fit"
    if each.site.state.retold and each.record.fidelity.rank > Fidelity.MATCHED.rank:
        return "it keeps more than a mean and a variance, which only training measures"
    if parametrize.is_parametrized(each.site.module):
        return "its affine is computed by a parametrization"
    if any(tensor.shape != (each.site.num_features,) for tensor in affine.values()):
        return "its affine is not per channel"
    if any(owners[id(tensor)] > 1 for tensor in affine.values()):
        return "its affine is another layer's too"
    return ""
