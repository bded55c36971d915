"""Residual streams: what is added up to a norm's input, and what else reads it.

In a pre-norm transformer every block reads the stream through a LayerNorm and adds to it. Such
norms subtract the mean over channels, so it may as well be 0 everywhere: if it is so in everything
that is added, and nothing reads the stream but such norms. Jiang, Gu and Pan, "Pre-RMSNorm and
Pre-CRMSNorm Transformers", NeurIPS 2023, arXiv 2305.14858.

What is added is followed back through sums and changes of layout to the layers and parameters that
make it; what reads it is followed forward in the same way. Between a layer and the stream there may
be a parameter that scales the channels (LayerScale): what makes the mean 0 behind it is known too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.fx
from torch import nn

from normswap.graph.known import is_norm
from normswap.graph.layouts import factor, sources
from normswap.graph.linear import channels_of_call, channels_of_layer
from normswap.graph.modules import read_site
from normswap.graph.neighbours import Neighbourhood
from normswap.graph.scaling import scale_of
from normswap.norms.beside import Centred, Scale, Stream
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


@dataclass(frozen=True)
class _Place:
    """Where the channels are, and what scales them before they are added to the stream."""

    dim: int
    scale: Scale | None = None


#: A node and where its channels are.
_At = tuple[torch.fx.Node, _Place]


class _Walk:
    """Collects what is on a stream or on its way there, each with where its channels are.

    Args:
        modules: the model's modules by path.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._on: dict[torch.fx.Node, _Place] = {}
        self._writers: dict[tuple[int, str], Centred] = {}
        self._training = True

    def channels_of(self, path: str, node: torch.fx.Node) -> int:
        """Which dimension of its input a norm takes for the channels."""
        return read_site(self._modules[path], path).state.channel_dim % len(_shape(node))

    def reach(self, start: torch.fx.Node, dim: int) -> None:
        """Follow a tensor back to all that writes to it, and forward to all that reads it."""
        waiting = [(start, _Place(dim))]
        while waiting:
            node, place = waiting.pop()
            if node not in self._on:
                self._on[node] = place
                waiting += [*self._before(node, place), *self._behind(node, place)]
            elif self._on[node].dim != place.dim:
                raise _NoStream(f"{_named(node)} has its channels at two places")
            elif self._on[node] != place:
                raise _NoStream(f"{_named(node)} is added to its stream with two scales")

    def stream(self, nodes: list[torch.fx.Node]) -> Stream:
        """What was found, if its writers write nowhere else."""
        scales = [each.scale for each in self._writers.values() if each.scale is not None]
        if any((id(scale.module), scale.name) in self._writers for scale in scales):
            raise _NoStream("what scales a part of its stream is added to it, too")
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

    def _before(self, node: torch.fx.Node, place: _Place) -> Iterator[_At]:
        """What a tensor on the stream is the sum of, if it is no layer's own output."""
        if node.op == "get_attr":
            self._writes(node, place)
        elif node.op == "call_module" and self._passes(node):
            yield _input(node), place
        elif found := self._scaled(node, place):
            yield found
        elif node.op == "call_module":
            self._layer(node, place)
        elif (given := channels_of_call(node)) and place.dim == len(_shape(node)) - 1:
            for weight in given:
                self._on[weight] = replace(place, dim=0)
                self._writes(weight, self._on[weight])
        else:
            summed = sources(node, place.dim)
            if summed is None:
                raise _NoStream(f"{_named(node)} makes what is added to its stream")
            yield from ((each, replace(place, dim=dim)) for each, dim in summed)

    def _behind(self, node: torch.fx.Node, place: _Place) -> Iterator[_At]:
        """What a tensor on the stream is handed on as, past norms that subtract its mean."""
        for user in node.users:
            if user.op == "call_module" and self._subtracts(user, node, place):
                continue
            if user.op == "call_module" and self._passes(user):
                yield user, place
                continue
            if place.scale and self._scaled(user, _Place(place.dim)) == (node, place):
                yield user, _Place(place.dim)
                continue
            dims = range(len(_shape(user))) if user.op == "call_function" else ()
            fits = [dim for dim in dims if (node, place.dim) in (sources(user, dim) or ())]
            if not fits:
                where = "reads what is scaled for its stream" if place.scale else "reads its stream"
                raise _NoStream(f"{_named(user)} {where}")
            yield user, replace(place, dim=fits[0])

    def _scaled(self, node: torch.fx.Node, place: _Place) -> _At | None:
        """What a parameter for each channel makes a tensor on the stream of, by multiplying."""
        if place.scale is not None:
            return None
        if node.op == "call_module":
            path, shape = str(node.target), _shape(node)
            module, before = self._modules[path], _input(node)
            if not (name := scale_of(module, shape[place.dim], place.dim, len(shape))):
                return None
            if module._forward_pre_hooks or module._forward_hooks:
                raise _NoStream(f"a hook sees what {path} scales for its stream")
        elif found := factor(node, place.dim):
            before, by = found
            path, _, name = str(by.target).rpartition(".")
            if name not in self._modules[path]._parameters:
                raise _NoStream(f"{by.target}, which is no parameter, scales what is added")
        else:
            return None
        return before, replace(place, scale=Scale(self._modules[path], name))

    def _subtracts(self, user: torch.fx.Node, node: torch.fx.Node, place: _Place) -> bool:
        """Whether a norm reads a tensor only after it has subtracted the mean over a dimension."""
        path = str(user.target)
        module = self._modules[path]
        if not is_norm(module) or user.all_input_nodes != [node]:
            return False
        state = read_site(module, path).state
        at = state.channel_dim % len(_shape(node))
        return state.rule == Rule.always(POSITION) and _Place(at) == place

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

    def _layer(self, node: torch.fx.Node, place: _Place) -> None:
        """Take the mean out of what a layer makes."""
        path = str(node.target)
        module = self._modules[path]
        if module._forward_hooks:
            raise _NoStream(f"a hook sees what {path} adds to its stream")
        at, dims = channels_of_layer(module)
        if not dims or at % len(_shape(node)) != place.dim:
            raise _NoStream(f"{path} ({type(module).__name__}) writes to its stream")
        for name, dim in dims.items():
            self._write(module, name, replace(place, dim=dim))

    def _writes(self, node: torch.fx.Node, place: _Place) -> None:
        """Take the mean out of a tensor that a forward reads by itself."""
        path, _, name = str(node.target).rpartition(".")
        module = self._modules[path]
        if name not in module._parameters:
            raise _NoStream(f"{node.target}, which is no parameter, is added to its stream")
        self._write(module, name, place)

    def _write(self, module: nn.Module, name: str, place: _Place) -> None:
        if name not in module._parameters:
            raise _NoStream(f"the {name} of a {type(module).__name__} on its stream is computed")
        if module._parameters[name] is None:
            return
        writer = Centred(module, name, place.dim, place.scale)
        if self._writers.setdefault((id(module), name), writer) != writer:
            raise _NoStream(f"a {type(module).__name__} is added to its stream with two scales")
        if place.scale is not None and not _finite(writer):
            raise _NoStream(
                f"the {name} of a {type(module).__name__} has no mean to be taken out: what scales "
                "it for its stream is zero for some channels, or nearly"
            )


def _finite(writer: Centred) -> bool:
    """Whether a parameter can be centred, as it is."""
    with torch.no_grad():
        value = writer.value(lambda module, name: module._parameters[name])
    return value.is_meta or bool(value.isfinite().all())


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
