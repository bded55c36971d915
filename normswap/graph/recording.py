"""A graph of one run on example inputs: it sees through any Python control flow.

Every function of torch that the run calls becomes a node, and every norm, and every module
without children, is one node. Where the model allows it, nothing is computed: the run is one of
shapes alone, on the meta device. Where its flow depends on data, it is run on the inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from normswap.graph.copying import structure_copy, without_hooks
from normswap.graph.tracer import Fragment, Trace, is_whole
from normswap.randomness import kept_random_state

__all__ = ["Recording", "record"]

#: What a node can hold beside nodes; anything else is told by its class.
_PLAIN = (int, float, bool, str, complex, type(None), type(...), torch.dtype, torch.device,
          torch.layout, torch.memory_format)  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """What a run showed.

    Args:
        trace: the graph, as of a trace without inputs.
        shapes: by the path of each module that is one node, the shape of its first input at
            every call.
    """

    trace: Trace
    shapes: Mapping[str, list[tuple[int, ...]]]


def record(model: nn.Module, example_inputs: Any, *, evaluating: bool = True) -> Recording:
    """Run a copy of a model once, and write down what it calls.

    Args:
        model: the model; it is not touched.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        evaluating: run all modules in eval mode; else in the modes that they are in.

    Raises:
        Exception: whatever the forward raises on these inputs.
    """
    on_meta: Any = tree_map(_as_meta, example_inputs)
    try:
        return _Recorder(_meta_copy(model), evaluating).run(on_meta)
    except Exception:  # its flow depends on data, or an operation has no shapes of its own
        return _Recorder(structure_copy(model), evaluating).run(example_inputs)


def _as_meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy without weights."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = _as_meta(tensor)
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return without_hooks(copy.deepcopy(model, memo))


class _Recorder(TorchFunctionMode):
    """Writes the calls of one run of a model, which is a copy, into a graph."""

    def __init__(self, model: nn.Module, evaluating: bool) -> None:
        super().__init__()
        self.model = model
        self.graph = torch.fx.Graph()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self._nodes: dict[int, torch.fx.Node] = {}
        self._held: list[Tensor] = []  # while they live, no other gets their identities
        self._within = 0  # of modules that are one node
        for module in model.modules() if evaluating else ():
            module.training = False  # eval() may be overridden
        self._names = {
            id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }

    def run(self, example_inputs: Any) -> Recording:
        """Run the model and tell what was seen."""
        args: tuple[Any, ...] = (example_inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            args, kwargs = (), dict(example_inputs)
        elif isinstance(example_inputs, (tuple, list)):
            args = tuple(example_inputs)
        tree_map(self._given, (args, kwargs))
        for path, module in self.model.named_modules():
            if not module._modules or is_whole(module):
                module.register_forward_pre_hook(self._entering(path), with_kwargs=True)
                module.register_forward_hook(self._leaving(path), with_kwargs=True)
        with torch.no_grad(), kept_random_state(), self:
            result = self.model(*args, **kwargs)
        self.graph.output(self._noted(result))
        return Recording(Trace([Fragment("", self.graph)]), self.shapes)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and write it down if it makes or changes a tensor."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._within:
            if getattr(func, "__name__", "") == "__setitem__":
                self._call("call_function", func, args, kwargs, args[0])
            elif _has_tensors(result):
                self._call("call_function", func, args, kwargs, result)
        return result

    def _given(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._bind(value, self.graph.placeholder(f"input_{len(self._held)}"))

    def _entering(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(iter((*args, *kwargs.values())), None)
            if not self._within and isinstance(first, Tensor):
                self.shapes.setdefault(path, []).append(tuple(first.shape))
            self._within += 1

        return note

    def _leaving(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self._within -= 1
            if not self._within:
                self._call("call_module", path, args, kwargs, output)

        return note

    def _call(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        node = self.graph.create_node(op, target, self._noted(args), self._noted(kwargs))
        self._made(result, node)

    def _made(self, result: Any, node: torch.fx.Node) -> None:
        """Let tensors in a result be what a node, or a part of it, makes."""
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, Mapping):
            for key, part in result.items():
                self._part(part, node, key)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                self._part(part, node, index)

    def _part(self, part: Any, node: torch.fx.Node, key: Any) -> None:
        if _has_tensors(part):
            self._made(part, self.graph.call_function(_getitem, (node, key)))

    def _bind(self, tensor: Tensor, node: torch.fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._held.append(tensor)

    def _noted(self, value: Any) -> Any:
        """Arguments as a node holds them."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._noted, value))
        if isinstance(value, Mapping):
            return {str(key): self._noted(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._noted, (value.start, value.stop, value.step)))
        return value if isinstance(value, _PLAIN) else type(value).__name__

    def _node_of(self, tensor: Tensor) -> torch.fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            name = self._names.get(id(tensor))
            if name is None:  # it was there before, or comes from what torch does not show
                node = self.graph.placeholder(f"unseen_{len(self._held)}")
            else:
                node = self.graph.create_node("get_attr", name)
            self._bind(tensor, node)
        return node


def _getitem(value: Any, key: Any) -> Any:
    return value[key]


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
