"""An adaptive torch.fx tracer: what cannot be traced becomes a leaf, and the trace goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.fx
from torch import Tensor, nn

from normswap.graph.calls import own_class
from normswap.graph.copying import structure_copy
from normswap.graph.known import is_norm
from normswap.randomness import kept_random_state

__all__ = ["Fragment", "Trace", "is_whole", "leave_whole", "trace"]

#: What other libraries declare not to be traced through; see `leave_whole`.
_WHOLE_MODULES: set[type[nn.Module]] = set()
_WHOLE_FUNCTIONS: set[Callable[..., Any]] = set()


def leave_whole(
    modules: Iterable[type[nn.Module]] = (), functions: Iterable[Callable[..., Any]] = ()
) -> None:
    """Keep modules of these classes, and calls of these functions, as single nodes of graphs."""
    _WHOLE_MODULES.update(modules)
    _WHOLE_FUNCTIONS.update(functions)


@dataclass(frozen=True)
class Fragment:
    """A part of a model that could be traced as one graph.

    Args:
        prefix: path of the part in the model, with a trailing dot; empty for the whole model.
        graph: its graph, for looking, not for running.
        host: path of the module that is one node in another graph, and has this part in it;
            ``None`` if there is no such graph.
    """

    prefix: str
    graph: torch.fx.Graph
    host: str | None = None


@dataclass(frozen=True)
class Trace:
    """What tracing saw of a model: graphs, and what stayed dark.

    Args:
        fragments: one graph if the whole model traces, otherwise one for each part that does.
        blind: reason why, by path, for modules whose forward could not be followed.
    """

    fragments: list[Fragment]
    blind: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module) -> Trace:
    """Trace a model without inputs and without touching it.

    Norms and childless modules are leaves. A child that fails to trace becomes a leaf of its
    parent's graph and is traced on its own, so that a failure costs only what spans its border.
    Defaulted arguments are held at their defaults.
    """
    try:
        copied = structure_copy(model)
    except Exception as error:
        return Trace([], {"": f"it cannot be copied for tracing: {_brief(error)}"})
    result = Trace([])
    with kept_random_state():
        _trace_part(copied, "", None, result)
    return result


def _trace_part(part: nn.Module, prefix: str, host: str | None, result: Trace) -> None:
    """Trace a part; of what fails in it, trace the children, each as a part of its own."""
    if type(part).forward is nn.Module.forward:  # a ModuleList or ModuleDict
        return _trace_children(part, prefix, host, result)
    tracer = _AdaptiveTracer()
    try:
        graph = tracer.trace(part, concrete_args=_defaults(part))
    except Exception as error:
        result.blind[prefix.rstrip(".")] = _brief(error)
        return _trace_children(part, prefix, host, result)
    result.fragments.append(Fragment(prefix, graph, host))
    for path, reason in tracer.failed.items():
        if any(path.startswith(f"{other}.") for other in tracer.failed):
            continue  # seen again when the children of the other are traced
        result.blind[prefix + path] = reason
        _trace_children(part.get_submodule(path), f"{prefix}{path}.", prefix + path, result)


def _trace_children(part: nn.Module, prefix: str, host: str | None, result: Trace) -> None:
    for name, child in part.named_children():
        if child._modules and not is_whole(child):
            _trace_part(child, f"{prefix}{name}.", host, result)


def is_whole(module: nn.Module) -> bool:
    """Whether a module is one node by its kind: a norm, or what Python does not run."""
    return is_norm(module) or isinstance(module, torch.jit.ScriptModule)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The forward's defaulted arguments: as proxies they would take the other branch."""
    parameters = inspect.signature(own_class(module).forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
        and not isinstance(parameter.default, Tensor)
    }


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _AdaptiveTracer(torch.fx.Tracer):
    """Collects in ``failed`` the paths, and why, that it had to leave whole."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(_WHOLE_FUNCTIONS))
        self.failed: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            not m._modules
            or is_whole(m)
            or module_qualified_name in self.failed
            or type(m) in _WHOLE_MODULES
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        before = next(iter(reversed(self.graph.nodes)), None)
        stack = dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._forget_after(before)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self.failed[path] = _brief(error)
            return self.create_proxy("call_module", path, args, kwargs)

    def _forget_after(self, last: torch.fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                return
            self.graph.erase_node(node)
