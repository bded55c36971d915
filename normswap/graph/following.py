"""Which activation alone reads each norm's output, down to the single call in a forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch.fx
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.graph.activations import ACTIVATION_NAMES, activation_calls, is_activation
from normswap.graph.calls import own_class
from normswap.graph.copying import structure_copy
from normswap.graph.forward import source_of
from normswap.graph.known import is_norm
from normswap.graph.lift import lifted_class
from normswap.graph.neighbours import Neighbourhood, sole_reader
from normswap.norms.beside import Activation

__all__ = ["Following"]


class _Mark(nn.Module):
    """Stands for the call of an activation in a copy that is only looked at.

    Args:
        function: what is called.
        held: the activation module's path, if it is one.
    """

    function: Any

    def __init__(self, function: Callable[..., Any], held: str) -> None:
        super().__init__()
        vars(self)["function"] = function  # no child
        self.held = held

    def forward(self, input: Tensor) -> Any:
        """Never run, only traced around."""
        return self.function(input)


class Following:
    """Answers which activation follows a norm; copies and traces at the first question.

    In a copy of the model every call of an activation in a forward becomes a child of its own, so
    that a trace shows which call it is.

    Args:
        model: the model, which is not touched.
        example_inputs: arguments of one run to record; ``None`` to trace without.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model = model
        self._inputs = example_inputs

    def of(self, path: str) -> Activation:
        """The activation that alone reads what the norm at a path computes, in both modes."""
        if isinstance(self._marked, str):
            return Activation(problem=self._marked)
        key = id(self._modules.get(path))
        found = {
            sole_reader(node, prefix, self._modules)
            for calls in self._calls
            for node, prefix in calls.get(key, ())
        }
        if not found:
            return Activation(problem="no graph shows what reads it")
        only = found.pop()
        if found or only is None:
            return Activation(problem="no single activation alone reads it")
        where, module = only
        if module is None and where in ACTIVATION_NAMES:
            return Activation(problem=f"{where} is called in a forward that cannot be rewritten")
        if not (isinstance(module, _Mark) or is_activation(module)):
            return Activation(problem=f"{where} reads it, which is no activation")
        if module is None or not self._goes_with(key, self._called(module)):
            return Activation(problem=f"what follows it, {where}, follows something else too")
        held = module.held if isinstance(module, _Mark) else where
        if held and self._is_served_alone(held, key):
            here: Any = self._model.get_submodule(held)
            return Activation(held, here, here, problem=_hooked(here))
        if not isinstance(module, _Mark):
            return Activation(problem=f"what follows it, {where}, follows something else too")
        function: Any = self._model.get_submodule(held) if held else module.function
        owner, _, name = where.rpartition(".")
        return Activation(
            where,
            function,
            owner=self._model.get_submodule(owner),
            name=name,
            problem=_hooked(function),
        )

    def _called(self, module: nn.Module) -> list[int]:
        """How often one forward calls a module, in each mode."""
        return [len(calls.get(id(module), ())) for calls in self._calls]

    def _goes_with(self, norm: int, calls: list[int]) -> bool:
        """Whether as many calls are a norm's in each mode."""
        return calls == [len(seen.get(norm, ())) for seen in self._calls]

    def _is_served_alone(self, path: str, norm: int) -> bool:
        """Whether an activation module is called after a norm and nowhere else, by one name."""
        module = self._modules[path]
        uses = [module, *(m for m in self._marks if m.held in self._names[id(module)])]
        counts = [sum(of_mode) for of_mode in zip(*map(self._called, uses), strict=True)]
        return self._goes_with(norm, counts) and len(self._names[id(module)]) == 1

    @cached_property
    def _marked(self) -> nn.Module | str:
        """The copy, or why there is none."""
        try:
            marked = structure_copy(self._model)
        except Exception as error:
            return f"the model cannot be copied for tracing: {error}"
        inside: set[int] = set()
        for path, module in list(marked.named_modules()):
            if is_norm(module) or isinstance(module, torch.jit.ScriptModule):
                inside.update(map(id, module.modules()))
            elif not (id(module) in inside or is_activation(module) or "forward" in vars(module)):
                _mark(module, path)
        return marked

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        marked = self._marked
        return {} if isinstance(marked, str) else dict(marked.named_modules(remove_duplicate=False))

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        """All names of each module."""
        names: dict[int, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            names[id(module)].append(path)
        return names

    @cached_property
    def _marks(self) -> list[_Mark]:
        return [module for module in self._modules.values() if isinstance(module, _Mark)]

    @cached_property
    def _calls(self) -> list[dict[int, list[tuple[torch.fx.Node, str]]]]:
        """In train and in eval mode the calls of each module, each with the prefix of its graph."""
        found = []
        marked = self._marked
        if isinstance(marked, str):
            return []
        for training in (True, False):
            calls: dict[int, list[tuple[torch.fx.Node, str]]] = defaultdict(list)
            for module in self._modules.values():
                module.training = training  # train() may be overridden
            for node, prefix in Neighbourhood(marked, self._inputs, evaluating=False).seen:
                calls[id(self._modules.get(prefix + str(node.target)))].append((node, prefix))
            found.append(calls)
        return found


def _mark(module: nn.Module, path: str) -> None:
    """Give a module of the copy a child for every call of an activation in its forward."""
    cls: Any = own_class(module)
    forward = source_of(cls.forward)
    for call in activation_calls(forward) if forward else ():
        function = call.function(module, forward) if forward else None
        if function is None or call.name in module._modules:
            continue
        try:
            module.__class__ = lifted_class(cls)
        except CannotConvert:
            return
        held = "" if call.attribute is None else f"{path}.{call.attribute}".lstrip(".")
        module._modules[call.name] = _Mark(function, held)


def _hooked(function: object) -> str:
    """Why an activation with hooks may not be replaced; empty without."""
    if not isinstance(function, nn.Module):
        return ""
    hooks = (
        *(function._forward_hooks, function._forward_pre_hooks),
        *(function._backward_hooks, function._backward_pre_hooks),
    )
    return "a hook is on the activation that follows it" if any(hooks) else ""
