"""Changes to a model that are made all or none."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.graph.calls import own_class
from normswap.graph.lift import is_lifted, lifted_class, without_children

__all__ = ["ABSENT", "Changes"]

#: Stands for an attribute that is not there.
ABSENT = object()


@dataclass
class Changes:
    """What is to happen to a model, collected first and then made at once.

    Args:
        modules: pairs of a module of the model and its replacement.
        classes: modules with the class that they get.
        children: modules that get a child for a call in their forward, with its name and the child.
        lowered: children for calls in forwards, which are to leave.
        subclasses: modules with what makes their class of the one that they have by then.
        writes: pairs of a tensor and the values that it is to hold.
        flags: pairs of a parameter and its ``requires_grad`` to be.
        parameters: modules with the name of a parameter and the object, or ``None``, to be there.
        attributes: modules with the name and the value to be of a plain attribute; `ABSENT`
            deletes it.
    """

    modules: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    children: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    lowered: list[nn.Module] = field(default_factory=list)
    subclasses: list[tuple[nn.Module, Callable[[type], type]]] = field(default_factory=list)
    writes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    flags: list[tuple[Tensor, bool]] = field(default_factory=list)
    parameters: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def make(self, model: nn.Module) -> nn.Module:
        """Make all changes, or on any exception, an interrupt included, none.

        Returns:
            The model, or its replacement where the model itself was replaced.
        """
        replacement = {id(old): new for old, new in self.modules}
        with ExitStack() as undo:
            for parent in list(model.modules()):
                for name, child in parent._modules.items():
                    if child is not None and id(child) in replacement:
                        put = partial(parent._modules.__setitem__, name)
                        _do(undo, put, child, replacement[id(child)])
            for module, cls in self.classes:
                _do(undo, partial(_set_class, module), type(module), cls)
            for owner in {id(owner): owner for owner, _, _ in self.children}.values():
                coming = {name for each, name, _ in self.children if each is owner}
                lifted = lifted_class(own_class(owner), {*owner._modules, *coming})
                _do(undo, partial(_set_class, owner), type(owner), lifted)
            for owner, name, child in self.children:
                _do(undo, partial(_set_child, owner, name), None, child)
            leaving = {id(child) for child in self.lowered}
            for owner in list(model.modules()) if leaving else ():
                if is_lifted(owner) and without_children(owner, leaving):
                    _do(undo, partial(_set_class, owner), type(owner), own_class(owner))
                for name, child in list(owner._modules.items()):
                    if id(child) in leaving:
                        _do(undo, partial(_set_child, owner, name), child, None)
            for module, made in self.subclasses:
                _do(undo, partial(_set_class, module), type(module), made(type(module)))
            for old, new in self.modules:
                _do(undo, partial(_bind_hooks, new), old, new)
            for tensor, value in self.writes:
                _do(undo, partial(_write, tensor), tensor.detach().clone(), value)
            for tensor, flag in self.flags:
                _do(undo, tensor.requires_grad_, tensor.requires_grad, flag)
                if not flag:  # or an optimizer would still move what is to be held
                    _do(undo, partial(setattr, tensor, "grad"), tensor.grad, None)
            for module, name, parameter in self.parameters:
                held = module._parameters
                _do(undo, partial(held.__setitem__, name), held[name], parameter)
            for module, name, attribute in self.attributes:
                put = partial(_set, module, name)
                _do(undo, put, vars(module).get(name, ABSENT), attribute)
            self._undo = undo.pop_all()
        return replacement.get(id(model), model)

    def take_back(self) -> None:
        """Unmake what `make` made, in the reverse order, to the bit."""
        self._undo.close()


def _do(undo: ExitStack, put: Callable[[Any], object], before: Any, after: Any) -> None:
    """Put ``after``; ``undo`` puts ``before``, and knows it first, lest an interrupt slip in."""
    undo.callback(put, before)
    put(after)


def _set_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls


def _set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None:
        module._modules.pop(name, None)
    else:
        module._modules[name] = child


def _set(module: nn.Module, name: str, value: object) -> None:
    if value is ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _bind_hooks(holder: nn.Module, owner: nn.Module) -> None:
    """Let the load hooks that remember their module remember ``owner``.

    Old and new module share their hook dictionaries, so that a handle removes its hook from both.
    """
    hooks: MutableMapping[int, Any] = holder._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            hooks[key] = type(hook)(hook.hook, owner)
