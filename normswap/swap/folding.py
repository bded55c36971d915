"""Methods of a model that fold its BatchNorms into convolutions: refused where those are others.

Re-parameterisation reads weight, bias, running statistics and eps of a BatchNorm that stands beside
a convolution. Of another norm in its place that would be an AttributeError or a failed assertion
somewhere inside, or the fold of a norm that evaluates otherwise. So a module with such methods has
a refusal in their places for as long as there are norms inside that they cannot take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from normswap.errors import UnsupportedModel
from normswap.graph.modules import read_site
from normswap.graph.readers import methods_that_read
from normswap.norms.counts import PLAIN
from normswap.norms.pool import RUNNING
from normswap.norms.registry import reader
from normswap.swap.changes import ABSENT, Changes
from normswap.swap.journal import record_of

__all__ = ["keep_from_folding"]

#: What is read of a BatchNorm that is folded.
_FOLDED = frozenset({"weight", "running_mean", "running_var", "eps"})


@dataclass(frozen=True)
class _Refused:
    """Stands for a method on the instance.

    Args:
        method: path, class and name of the method.
        norm: path and class of a norm that it would read.
    """

    method: str
    norm: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedModel(
            f"{self.method} folds BatchNorms, and {self.norm} is none that it takes; call it "
            "before converting, or convert back by normswap.revert first"
        )


def keep_from_folding(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` that methods which fold BatchNorms are refused, or are so no longer.

    Args:
        model: the model to be changed.
        changes: its replacements, complete.
    """
    replacement = {id(old): new for old, new in changes.modules}
    for path, module in model.named_modules():
        if id(module) in replacement or reader(type(module)) is not None:
            continue
        cls: Any = type(module)
        methods = methods_that_read(cls, _FOLDED)
        swapped = list(_swapped(module, replacement)) if methods else []
        for name, read in methods.items():
            others = [at for at, norm in swapped if not _folds(norm, at, read)]
            there = vars(module).get(name, ABSENT)
            if others and there is ABSENT:
                where = f"{path or 'the model'} ({cls.__name__}).{name}"
                norm = dict(swapped)[others[0]]
                at = f"{path}.{others[0]}".lstrip(".")
                refused = _Refused(where, f"{at} ({type(norm).__name__})")
                changes.attributes.append((module, name, refused))
            elif not others and isinstance(there, _Refused):
                changes.attributes.append((module, name, ABSENT))


def _swapped(
    module: nn.Module, replacement: dict[int, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The norms inside, by path, that a conversion put in place."""
    for path, part in module.named_modules():
        norm = replacement.get(id(part), part)
        if record_of(norm) is not None:
            yield path, norm


def _folds(norm: nn.Module, path: str, read: frozenset[str]) -> bool:
    """Whether a method folds a norm rightly, given the names of all that it reads.

    It has to be a BatchNorm in eval mode, with all that is read of the norm that was there first,
    and of the classes that it is asked for.
    """
    record = record_of(norm)
    if record is None or reader(type(norm)) is None:
        return False
    state, first = read_site(norm, path).state, record.original
    if (state.rule.eval, state.counts) != (RUNNING, PLAIN) or state.retold or state.obstacle:
        return False
    before, now = ({cls.__name__ for cls in type(each).__mro__} for each in (first, norm))
    missing = [name for name in read if hasattr(first, name) and not hasattr(norm, name)]
    return not missing and not read & (before - now)
