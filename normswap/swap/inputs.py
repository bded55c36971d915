"""Models whose call takes the extra inputs of their norms as keywords.

The instance that was converted gets a generated subclass of its class, whose forwards take the
inputs out of their keywords and hand on all the rest. So it stays what it is to everybody: its
own class's methods, wrappers for ranks, compilers and hooks see a module that is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial, wraps
from typing import Any

from torch import nn

from normswap.errors import UnsupportedModel
from normswap.graph.modules import require_module
from normswap.norms.generated import generated
from normswap.norms.inputs.call import entered, giving
from normswap.norms.inputs.kinds import ExtraInput
from normswap.norms.inputs.norm import InputNorm
from normswap.swap.changes import Changes
from normswap.swap.journal import record_of

__all__ = ["given", "inputs", "keep_asking"]

_INPUTS = "_normswap_inputs"
#: How many positional arguments come before the first of a method's own: the module itself.
_SELF = 1


def inputs(model: nn.Module) -> dict[str, ExtraInput]:
    """The extra inputs that the norms of a converted model take.

    A converted model takes them as keywords of its call, and of other methods that are called
    ``forward...``, such as ``forward_features``.

    Args:
        model: any model.

    Returns:
        By name what each is: ``shape``, in which ``"N"`` is the number of samples, ``dtype``,
        ``default`` and whether it is ``required``; ``print()`` shows all forms that it may have.
    """
    require_module(model)
    return {one.name: one for one in reversed(_asked_of(list(model.modules())))}


def given(model: nn.Module, **values: Any) -> AbstractContextManager[None]:
    """Let the norms of a model see extra inputs within a ``with`` block, in this thread.

    It is for what is no call of the converted model: for a part of it, or for a feature extractor
    that was made of it. Activations that are checkpointed find the inputs in a backward only if
    that is in the block too.

    Args:
        model: the model, or the part, that will be called.
        **values: its extra inputs by name, see `inputs`.

    Raises:
        InputError: an input is missing, does not fit, or is none that the norms take.
    """
    require_module(model)
    return giving(_asked_of(list(model.modules())), values)


def keep_asking(model: nn.Module, changes: Changes) -> None:
    """Add to ``changes`` that the model takes what its norms will ask for, and no more.

    So do parts of it that were converted by themselves before.

    Args:
        model: the model to be changed.
        changes: its replacements, complete.
    """
    replacement = {id(old): new for old, new in changes.modules}
    leaving = {id(norm) for norm in changes.lowered}
    coming = [(owner, child) for owner, _, child in changes.children]

    def asked_of(part: nn.Module) -> tuple[ExtraInput, ...]:
        inside = list(part.modules())
        there = {id(module) for module in inside}
        stay = [replacement.get(id(m), m) for m in inside if id(m) not in leaving]
        norms = [*stay, *(child for owner, child in coming if id(owner) in there)]
        put = (norm for norm in norms if record_of(norm) is not None)
        # Those that a model was written with are given their inputs by whoever wrote it.
        return _asked_of(norms) if _asked_of(list(put)) else ()

    for part in model.modules():
        asks = _asks_for(part)
        if id(part) in replacement or not (asks or part is model):
            continue
        asked = asked_of(part)
        if asked == asks:
            # Another change may give it a class that was generated without regard to this one.
            if asks:
                changes.subclasses.append((part, partial(_asking, asked=asked)))
            continue
        if asked and "forward" in vars(part):
            raise UnsupportedModel(
                f"the forward of this {type(part).__name__} was replaced on the instance, so it "
                "cannot be made to take extra inputs; undo that first, or do it afterwards"
            )
        changes.subclasses.append((part, partial(_asking, asked=asked)))


def _asked_of(modules: list[nn.Module]) -> tuple[ExtraInput, ...]:
    """What norms among some modules take, each once, in their order."""
    taken = (one for norm in modules if isinstance(norm, InputNorm) for one in norm.extra_inputs)
    return tuple(dict.fromkeys(taken))


def _asks_for(module: nn.Module) -> tuple[ExtraInput, ...]:
    """The inputs that a module takes in its call."""
    asked: tuple[ExtraInput, ...] = vars(type(module)).get(_INPUTS, ())
    return asked


def _asking(cls: type[nn.Module], asked: tuple[ExtraInput, ...]) -> type[nn.Module]:
    """The class of a module that takes inputs in its call, given the class that it has now."""
    beneath: Any = cls.__base__ if _INPUTS in vars(cls) else cls
    made: type[nn.Module] = _generated(beneath, asked) if asked else beneath
    return made


@cache
def _generated(beneath: Any, asked: tuple[ExtraInput, ...]) -> Any:
    """The subclass of a class whose forwards take inputs."""
    members: dict[str, Any] = {_INPUTS: asked}
    for name in dir(beneath):
        method = getattr(beneath, name)
        if name.startswith("forward") and inspect.isfunction(method):
            members[name] = _taking(method, asked)
    return generated(beneath, partial(_asking, asked=asked), **members)


def _taking(method: Callable[..., Any], asked: tuple[ExtraInput, ...]) -> Callable[..., Any]:
    """A method that takes inputs, too."""
    names = tuple(dict.fromkeys(one.name for one in asked))
    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())
    own = {p.name: at - _SELF for at, p in enumerate(parameters) if p.name in names}

    @wraps(method)
    def taking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return entered(partial(method, self), asked, own, args, kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(n, keyword, default=None) for n in names if n not in own]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in parameters if p not in rest]
    taking.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*named, *extra, *rest]
    )
    return taking
