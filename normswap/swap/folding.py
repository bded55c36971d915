"""Methods of a model that fold its BatchNorms into convolutions: refused where those are others.

Re-parameterisation reads weight, bias, running statistics and eps of a BatchNorm that stands beside
a convolution. Of another norm in its place that would be an AttributeError somewhere inside, or the
fold of a norm that evaluates otherwise. So a module with such methods has a refusal in their places
for as long as there are norms inside which are no BatchNorm in eval mode.
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
            f"{self.method} folds BatchNorms, and {self.norm} is none any more; call it before "
            "converting, or convert back by normswap.revert first"
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
        others = list(_no_batch_norms(module, replacement)) if methods else []
        for name in methods:
            there = vars(module).get(name, ABSENT)
            if others and there is ABSENT:
                where = f"{path or 'the model'} ({type(module).__name__}).{name}"
                norm = f"{path}.{others[0]}".lstrip(".")
                changes.attributes.append((module, name, _Refused(where, norm)))
            elif not others and isinstance(there, _Refused):
                changes.attributes.append((module, name, ABSENT))


def _no_batch_norms(module: nn.Module, replacement: dict[int, nn.Module]) -> Iterator[str]:
    """Path and class of swapped norms inside that are no BatchNorms in eval mode."""
    for path, part in module.named_modules():
        norm = replacement.get(id(part), part)
        if record_of(norm) is None:
            continue
        state = read_site(norm, path).state if reader(type(norm)) is not None else None
        folds = state is not None and (state.rule.eval, state.counts) == (RUNNING, PLAIN)
        if state is None or not folds or state.retold or state.obstacle:
            yield f"{path} ({type(norm).__name__})"
