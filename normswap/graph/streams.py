"""Residual streams: what is added up to a norm's input, and what else reads it.

In a pre-norm transformer every block reads the stream through a LayerNorm and adds to it. Such
norms subtract the mean over channels, so it may as well be 0 everywhere: if it is so in everything
that is added, and nothing reads the stream but such norms. Jiang, Gu and Pan, "Pre-RMSNorm and
Pre-CRMSNorm Transformers", NeurIPS 2023, arXiv 2305.14858.

What is added is followed back through sums and changes of layout to the layers and parameters that
make it; what reads it is followed forward in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch.fx
from torch import nn

from normswap.graph.known import is_norm
from normswap.graph.layouts import sources
from normswap.graph.modules import read_site
from normswap.graph.neighbours import Neighbourhood
from normswap.norms.beside import Centred, Stream
from normswap.norms.pool import POSITION, Rule

__all__ = ["Streams"]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Streams:
    """Answers which stream a norm reads; records a run at the first question.

    Args:
        model: the model, which is not touched.
        example_inputs: arguments of one run to record; without them no stream can be told.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model = model
        self._inputs = example_inputs

    def of(self, path: str) -> Stream:
        """The stream that the norm at a path reads at all of its calls."""
        if self._inputs is None:
            return Stream(problem="no run shows the stream that it reads: give example_inputs")
        calls = [node for node in self._nodes if _calls(node, path)]
        if not calls:
            return Stream(problem="it is never called")
        walk = _Walk(self._modules)
        try:
            for call in calls:
                walk.reach(_input(call), walk.channels_of(path, _input(call)))
            return walk.stream(self._nodes)
        except _NoStream as problem:
            return Stream(problem=str(problem))

    @cached_property
    def _nodes(self) -> list[torch.fx.Node]:
        around = Neighbourhood(self._model, self._inputs)
        return [node for fragment in around.trace.fragments for node in fragment.graph.nodes]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules(remove_duplicate=False))


class _NoStream(Exception):
    """Why a stream cannot be centred."""


class _Walk:
    """Collects what is on a stream, each with the dimension that its channels are.

    Args:
        modules: the model's modules by path.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._on: dict[torch.fx.Node, int] = {}
        self._writers: dict[tuple[int, str], Centred] = {}
        self._training = True

    def channels_of(self, path: str, node: torch.fx.Node) -> int:
        """Which dimension of its input a norm takes for the channels."""
        return read_site(self._modules[path], path).state.channel_dim % len(_shape(node))

    def reach(self, start: torch.fx.Node, dim: int) -> None:
        """Follow a tensor back to all that writes to it, and forward to all that reads it."""
        waiting = [(start, dim)]
        while waiting:
            node, dim = waiting.pop()
            if node not in self._on:
                self._on[node] = dim
                waiting += [*self._before(node, dim), *self._behind(node, dim)]
            elif self._on[node] != dim:
                raise _NoStream(f"{_named(node)} has its channels at two places")

    def stream(self, nodes: list[torch.fx.Node]) -> Stream:
        """What was found, if its writers write nowhere else."""
        layers = {owner for owner, _ in self._writers}
        for node in nodes:
            holder, _, name = str(node.target).rpartition(".")
            writes = {
                "call_module": id(self._modules.get(str(node.target))) in layers,
                "get_attr": (id(self._modules.get(holder)), name) in self._writers,
            }
            if writes.get(node.op) and node not in self._on:
                raise _NoStream(
                    f"{node.target}, which writes to its stream, is also used elsewhere"
                )
        return Stream(tuple(self._writers.values()), self._training, "")

    def _before(self, node: torch.fx.Node, dim: int) -> Iterator[tuple[torch.fx.Node, int]]:
        """What a tensor on the stream is the sum of, if it is no layer's own output."""
        if node.op == "get_attr":
            self._writes(node, dim)
        elif node.op == "call_module" and self._passes(node):
            yield _input(node), dim
        elif node.op == "call_module":
            self._layer(node, dim)
        elif _made_linearly(node) and dim == len(_shape(node)) - 1:
            for weight in _made_linearly(node):
                self._on[weight] = 0
                self._writes(weight, 0)
        else:
            found = sources(node, dim)
            if found is None:
                raise _NoStream(f"{_named(node)} makes what is added to its stream")
            yield from found

    def _behind(self, node: torch.fx.Node, dim: int) -> Iterator[tuple[torch.fx.Node, int]]:
        """What a tensor on the stream is handed on as, past norms that subtract its mean."""
        for user in node.users:
            if user.op == "call_module" and self._subtracts(user, node, dim):
                continue
            if user.op == "call_module" and self._passes(user):
                yield user, dim
                continue
            places = range(len(user.meta.get("shape", ()))) if user.op == "call_function" else ()
            fits = [place for place in places if (node, dim) in (sources(user, place) or ())]
            if not fits:
                raise _NoStream(f"{_named(user)} reads its stream")
            yield user, fits[0]

    def _subtracts(self, user: torch.fx.Node, node: torch.fx.Node, dim: int) -> bool:
        """Whether a norm reads a tensor only after it has subtracted the mean over a dimension."""
        path = str(user.target)
        module = self._modules[path]
        if not is_norm(module) or user.all_input_nodes != [node]:
            return False
        state = read_site(module, path).state
        at = state.channel_dim % len(_shape(node))
        return state.rule == Rule.always(POSITION) and at == dim

    def _passes(self, node: torch.fx.Node) -> bool:
        """Whether a module hands on its input in eval mode; in training dropout may not."""
        module: Any = self._modules[str(node.target)]
        if isinstance(module, nn.Identity):
            return True
        dropout = isinstance(module, _DROPOUTS)
        if not dropout and not node.meta.get("passes"):
            return False
        self._training = self._training and dropout and module.p == 0
        return True

    def _layer(self, node: torch.fx.Node, dim: int) -> None:
        """Take the mean out of what a layer makes."""
        path = str(node.target)
        module, last = self._modules[path], len(_shape(node)) - 1
        if module._forward_hooks:
            raise _NoStream(f"a hook sees what {path} adds to its stream")
        at, places = -1, dict[str, int]()
        if _is_plain(module, nn.Linear):
            at, places = last, {"weight": 0, "bias": 0}
        elif _is_plain(module, nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1:
            at, places = 1, {"weight": 0, "bias": 0}
        elif _is_plain(module, nn.Embedding) and module.max_norm is None:
            at, places = last, {"weight": 1}
        elif _is_conv1d(module):
            at, places = last, {"weight": 1, "bias": 0}
        if at != dim:
            raise _NoStream(f"{path} ({type(module).__name__}) writes to its stream")
        for name, place in places.items():
            self._write(module, name, place)

    def _writes(self, node: torch.fx.Node, dim: int) -> None:
        """Take the mean out of a tensor that a forward reads by itself."""
        path, _, name = str(node.target).rpartition(".")
        module = self._modules[path]
        if name not in module._parameters:
            raise _NoStream(f"{node.target}, which is no parameter, is added to its stream")
        self._write(module, name, dim)

    def _write(self, module: nn.Module, name: str, dim: int) -> None:
        if name not in module._parameters:
            raise _NoStream(f"the {name} of a {type(module).__name__} on its stream is computed")
        if module._parameters[name] is not None:
            self._writers[id(module), name] = Centred(module, name, dim)


def _is_plain(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether a module computes what one of torch's classes does."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear of GPT-2 in transformers, whose weight is (in, out)."""
    cls = type(module)
    known = (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return known and "forward" not in vars(module)


def _made_linearly(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The weight and bias of a function that is linear in its last step."""
    called, name = node, _named(node)
    if name == "_getitem" and node.args[1] == 0:
        called = node.all_input_nodes[0]
        name = _named(called)
    given: list[Any] = []
    if called is node and name == "linear":
        given = [*called.args[1:], *(called.kwargs.get(key) for key in ("weight", "bias"))]
    elif called is not node and name == "multi_head_attention_forward":
        given = list(called.args[11:13])
    nodes = [each for each in given if isinstance(each, torch.fx.Node)]
    return nodes if all(each.op == "get_attr" for each in nodes) else []


def _calls(node: torch.fx.Node, path: str) -> bool:
    return node.op == "call_module" and node.target == path


def _input(node: torch.fx.Node) -> torch.fx.Node:
    """What a module is called with."""
    if not node.all_input_nodes:
        raise _NoStream(f"{node.target} is given no tensor")
    return node.all_input_nodes[0]


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _named(node: torch.fx.Node) -> str:
    """What a node is, for people."""
    if node.op == "output":
        return "the model's output"
    if node.op == "placeholder":
        return "an input of the model"
    return str(getattr(node.target, "__name__", node.target))
