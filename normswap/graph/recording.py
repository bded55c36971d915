"""A graph of one run on example inputs: it sees through any Python control flow.

Every function of torch that the run calls becomes a node, and every norm, and every module
without children, is one node. Where the model allows it, nothing is computed: the run is one of
shapes alone, on the meta device. Where its flow depends on data, it is run on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from normswap.graph.copying import as_meta, meta_copy, structure_copy
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
        unseen: by the path of a module, what it was given that nothing seen has made.
    """

    trace: Trace
    shapes: Mapping[str, list[tuple[int, ...]]]
    unseen: Mapping[str, str]


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    evaluating: bool = True,
    into: Callable[[nn.Module], bool] | None = None,
) -> Recording:
    """Run a copy of a model once, and write down what it calls.

    Args:
        model: the model; it is not touched.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments. They are not touched either.
        evaluating: run all modules in eval mode; else in the modes that they are in.
        into: which modules without children are no nodes, but what they call is. Default none. One
            that calls nothing and hands on its input is a node always.

    Raises:
        Exception: whatever the forward raises on these inputs.
    """
    try:
        recorder = _Recorder(meta_copy(model), evaluating, into)
        return recorder.run(tree_map(as_meta, example_inputs))
    except Exception:  # its flow depends on data, or an operation has no shapes of its own
        recorder = _Recorder(structure_copy(model), evaluating, into)
        return recorder.run(tree_map(_cloned, example_inputs))


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Recorder(TorchFunctionMode):
    """Writes the calls of one run of a model, which is a copy, into a graph."""

    def __init__(
        self, model: nn.Module, evaluating: bool, into: Callable[[nn.Module], bool] | None
    ) -> None:
        super().__init__()
        self.model = model
        self._into = into or (lambda module: False)
        self.graph = torch.fx.Graph()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.unseen: dict[str, str] = {}
        self._nodes: MutableMapping[Tensor, torch.fx.Node] = WeakTensorKeyDictionary()
        self._written: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._within = 0  # of modules that are one node
        self._paths = [""]  # of the modules that are being run
        self._called = 0  # how many functions
        self._begun: list[int] = []  # how many were when each of the modules was begun
        self._names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        for path, module in model.named_modules():
            if evaluating:
                module.training = False  # eval() may be overridden
            for held in (vars(module), module._parameters, module._buffers):
                for name, value in held.items():
                    if isinstance(value, Tensor) and value not in self._names:
                        self._names[value] = f"{path}.{name}".lstrip(".")

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
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks; what it makes is told as unseen
            one = is_whole(module) or not (module._modules or self._into(module))
            module.register_forward_pre_hook(self._entering(path, one), with_kwargs=True)
            # Always: the model may catch what a part of it raises, and go on.
            module.register_forward_hook(
                self._leaving(path, one), with_kwargs=True, always_call=True
            )
        with torch.no_grad(), kept_random_state(), self:
            result = self.model(*args, **kwargs)
        self.graph.output(self._noted(result))
        return Recording(Trace([Fragment("", self.graph)]), self.shapes, self.unseen)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and write it down if it makes or changes a tensor."""
        kwargs = kwargs or {}
        self._called += 1
        result = func(*args, **kwargs)
        if not self._within:
            if getattr(func, "__name__", "") == "__setitem__":
                self._call("call_function", func, args, kwargs, args[0])
            elif _has_tensors(result):
                self._call("call_function", func, args, kwargs, result)
        return result

    def _given(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._bind(value, self.graph.placeholder(f"input_{len(self.graph.nodes)}"))

    def _entering(self, path: str, one: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._paths.append(path)
            first = next(iter((*args, *kwargs.values())), None)
            if one and not self._within and isinstance(first, Tensor):
                self.shapes.setdefault(path, []).append(tuple(first.shape))
            self._within += one
            self._begun.append(self._called)

        return note

    def _leaving(self, path: str, one: bool) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            did_nothing = self._begun.pop() == self._called
            first = next(iter((*args, *kwargs.values())), None)
            passes = did_nothing and isinstance(first, Tensor) and output is first
            self._within -= one
            if not self._within and (one or (passes and not module._modules)):
                node = self._call("call_module", path, args, kwargs, output)
                node.meta["passes"] = passes
            self._paths.pop()

        return note

    def _call(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> torch.fx.Node:
        node = self.graph.create_node(op, target, self._noted(args), self._noted(kwargs))
        node.meta["within"] = self._paths[-1]
        self._made(result, node)
        for tensor in _tensors((args, kwargs, result)):
            self._follow_write(tensor, node)
        return node

    def _made(self, result: Any, node: torch.fx.Node) -> None:
        """Let tensors in a result be what a node, or a part of it, makes."""
        if isinstance(result, Tensor):
            self._bind(result, node)
        for key, part in _parts(result):
            if _has_tensors(part):
                self._made(part, self.graph.call_function(_getitem, (node, key)))

    def _bind(self, tensor: Tensor, node: torch.fx.Node) -> None:
        self._nodes[tensor] = node
        node.meta["shape"] = tuple(tensor.shape)
        if tensor not in self._written:
            self._written[tensor] = _version(tensor)

    def _follow_write(self, tensor: Tensor, node: torch.fx.Node) -> None:
        """If a call wrote into a tensor, all that lies in the same memory is another one now."""
        version = _version(tensor)
        if version == self._written.get(tensor, version):
            return
        with torch._C.DisableTorchFunction():
            memory = _memory(tensor)
            shared = [each for each in list(self._nodes) if _memory(each) == memory]
        for each in shared:
            self._written[each] = _version(each)
            if self._nodes[each] is not node:
                before = self._nodes[each]
                self._bind(each, self.graph.call_function(_written_over, (before, node)))

    def _noted(self, value: Any) -> Any:
        """Arguments as a node holds them."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, slice):
            return slice(*map(self._noted, (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._noted, value))
        if isinstance(value, Mapping) or _has_tensors(value):
            return {str(key): self._noted(part) for key, part in _parts(value)}
        return value if isinstance(value, _PLAIN) else type(value).__name__

    def _node_of(self, tensor: Tensor) -> torch.fx.Node:
        node = self._nodes.get(tensor)
        if node is None:
            name = self._names.get(tensor)
            if name is None:
                node = self.graph.placeholder(f"unseen_{len(self.graph.nodes)}")
                self.unseen.setdefault(
                    self._paths[-1],
                    f"it is given a tensor {tuple(tensor.shape)} that comes from no call of torch "
                    "that can be seen",
                )
            else:
                node = self.graph.create_node("get_attr", name)
            self._bind(tensor, node)
        return node


def _getitem(value: Any, key: Any) -> Any:
    return value[key]


def _written_over(before: Any, by: Any) -> Any:
    return before


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container holds, each with its key; nothing of what is none."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((each.name, getattr(value, each.name, None)) for each in fields(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    for _, part in _parts(value):
        yield from _tensors(part)


def _has_tensors(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _version(tensor: Tensor) -> int:
    """How often a tensor, or another in its memory, was written into."""
    with torch._C.DisableTorchFunction():
        return 0 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """The memory that a tensor lies in."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    cdata: int = tensor.untyped_storage()._cdata
    return cdata
