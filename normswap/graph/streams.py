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
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch.fx
from torch import nn

from normswap.graph.known import is_norm
from normswap.graph.layouts import factor, sources
from normswap.graph.linear import channels_of_call, channels_of_layer, computes_as
from normswap.graph.modules import read_site
from normswap.graph.recording import record
from normswap.graph.writers import NoStream, Place, Writers
from normswap.norms.beside import Scale, Stream
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
        self._known: list[tuple[_Walk, Stream]] = []

    def of(self, path: str) -> Stream:
        """The stream that the norm at a path reads at all of its calls."""
        if self._inputs is None:
            return Stream(problem="no run shows the stream that it reads: give example_inputs")
        calls = [node for node in self._nodes if _calls(node, path)]
        if not calls:
            return Stream(problem="it is never called")
        try:
            starts = [(_input(call), self._place(path, _input(call))) for call in calls]
            known = (stream for walk, stream in self._known if walk.has(starts))
            return next(known, None) or self._walked(starts)
        except NoStream as problem:
            return Stream(problem=str(problem))

    def _place(self, path: str, node: torch.fx.Node) -> Place:
        """Which dimension of its input a norm takes for the channels."""
        channel_dim = read_site(self._modules[path], path).state.channel_dim
        return Place(channel_dim % len(_shape(node)))

    def _walked(self, starts: list[_At]) -> Stream:
        """What is found from some tensors on, which is so for all other norms on the way."""
        walk = _Walk(self._modules)
        try:
            walk.reach(starts)
            stream = walk.stream(self._nodes)
        except NoStream as problem:
            stream = Stream(problem=str(problem))
        self._known.append((walk, stream))
        return stream

    @cached_property
    def _nodes(self) -> list[torch.fx.Node]:
        recording = record(self._model, self._inputs, into=_looked_into)
        return [node for part in recording.trace.fragments for node in part.graph.nodes]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules(remove_duplicate=False))


#: A node and where its channels are.
_At = tuple[torch.fx.Node, Place]


class _Walk:
    """Collects what is on a stream or on its way there, each with where its channels are.

    Args:
        modules: the model's modules by path.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._on: dict[torch.fx.Node, Place] = {}
        self._writers = Writers()
        self._linear: set[torch.fx.Node] = set()  # calls that are given their weights
        self._training = True

    def has(self, ats: list[_At]) -> bool:
        """Whether it has come by all of these."""
        return all(self._on.get(node) == place for node, place in ats)

    def reach(self, starts: list[_At]) -> None:
        """Follow tensors back to all that writes to them, and forward to all that reads them."""
        waiting = list(starts)
        while waiting:
            node, place = waiting.pop()
            if node not in self._on:
                self._on[node] = place
                self._unseen(node)
                waiting += [*self._before(node, place), *self._behind(node, place)]
            elif self._on[node].dim != place.dim:
                raise NoStream(f"{_named(node)} has its channels at two places")
            elif self._on[node] != place:
                raise NoStream(f"{_named(node)} is added to its stream with two scales")

    def stream(self, nodes: list[torch.fx.Node]) -> Stream:
        """What was found, if its writers write nowhere else."""
        for node in nodes:
            holder, _, name = str(node.target).rpartition(".")
            writes = {
                "call_module": self._writers.has(self._modules.get(str(node.target))),
                "get_attr": self._writers.has(self._modules.get(holder), name),
            }
            elsewhere = node not in self._on or not self._given_here(node)
            if writes.get(node.op) and elsewhere:
                raise NoStream(f"{node.target}, which writes to its stream, is also used elsewhere")
        return Stream(self._writers.centred, self._training, "")

    def _before(self, node: torch.fx.Node, place: Place) -> Iterator[_At]:
        """What a tensor on the stream is the sum of, if it is no layer's own output."""
        if node.op == "get_attr":
            self._writers.add(*self._parameter(node, "is added to its stream"), place)
        elif node.op == "call_module" and self._passes(node):
            yield _input(node), place
        elif found := self._scaled(node, place):
            yield found
        elif node.op == "call_module":
            path = str(node.target)
            self._writers.add_layer(self._modules[path], path, place, len(_shape(node)))
        elif (given := channels_of_call(node))[1] and place.dim == len(_shape(node)) - 1:
            self._linear.add(given[0])
            for weight in given[1]:
                self._on[weight] = replace(place, dim=0)
                held = self._parameter(weight, "writes to its stream")
                self._writers.add(*held, self._on[weight])
        else:
            summed = sources(node, place.dim)
            if summed is None:
                raise NoStream(f"{_named(node)} makes what is added to its stream")
            yield from ((each, replace(place, dim=dim)) for each, dim in summed)

    def _behind(self, node: torch.fx.Node, place: Place) -> Iterator[_At]:
        """What a tensor on the stream is handed on as, past norms that subtract its mean."""
        for user in node.users:
            if user.op == "call_module" and self._subtracts(user, node, place):
                continue
            if user.op == "call_module" and self._passes(user):
                yield user, place
                continue
            if place.scale and self._scaled(user, Place(place.dim)) == (node, place):
                yield user, Place(place.dim)
                continue
            dims = range(len(_shape(user))) if user.op == "call_function" else ()
            fits = [dim for dim in dims if (node, place.dim) in (sources(user, dim) or ())]
            if not fits:
                where = "reads what is scaled for its stream" if place.scale else "reads its stream"
                raise NoStream(f"{_named(user)} {where}")
            yield user, replace(place, dim=fits[0])

    def _scaled(self, node: torch.fx.Node, place: Place) -> _At | None:
        """What a parameter for each channel makes a tensor on the stream of, by multiplying."""
        found = factor(node, place.dim) if place.scale is None else None
        if found is None:
            return None
        before, by = found
        scale = Scale(*self._parameter(by, "scales what is added"))
        return before, replace(place, scale=scale)

    def _parameter(self, node: torch.fx.Node, does: str) -> tuple[nn.Module, str]:
        """The module that holds the parameter which a node reads, and its name there."""
        path, _, name = str(node.target).rpartition(".")
        module = self._modules[path]
        if name not in module._parameters:
            raise NoStream(f"{node.target}, which is no parameter, {does}")
        return module, name

    def _unseen(self, node: torch.fx.Node) -> None:
        """Refuse what a hook sees in a layer whose calls are on the stream."""
        path = str(node.meta.get("within", ""))
        module = self._modules[path]
        watched = module._forward_hooks or (
            node.op == "call_function" and module._forward_pre_hooks
        )
        if path and not module._modules and watched:
            raise NoStream(f"a hook sees what {path} adds to its stream")

    def _given_here(self, node: torch.fx.Node) -> bool:
        """Whether a weight that calls are given is given to those on the stream only."""
        calls = self._linear.intersection(node.users)
        return not calls or calls == set(node.users)

    def _subtracts(self, user: torch.fx.Node, node: torch.fx.Node, place: Place) -> bool:
        """Whether a norm reads a tensor only after it has subtracted the mean over a dimension."""
        path = str(user.target)
        module = self._modules[path]
        if not is_norm(module) or user.all_input_nodes != [node]:
            return False
        if module._forward_pre_hooks:
            raise NoStream(f"a hook sees what {path} reads of its stream")
        state = read_site(module, path).state
        at = state.channel_dim % len(_shape(node))
        return state.rule == Rule.always(POSITION) and Place(at) == place

    def _passes(self, node: torch.fx.Node) -> bool:
        """Whether a module hands on its input in eval mode; in training dropout may not."""
        module: Any = self._modules[str(node.target)]
        if computes_as(module, nn.Identity):
            return True
        dropout = computes_as(module, *_DROPOUTS)
        if not dropout and not node.meta.get("passes"):
            return False
        self._training = self._training and dropout and module.p == 0
        return True


def _looked_into(module: nn.Module) -> bool:
    """Whether it is not known what a layer computes before its calls are seen."""
    known = type(module).__module__.startswith("torch.") or channels_of_layer(module)[1]
    return not known and not computes_as(module, nn.Identity, *_DROPOUTS)


def _calls(node: torch.fx.Node, path: str) -> bool:
    return node.op == "call_module" and node.target == path


def _input(node: torch.fx.Node) -> torch.fx.Node:
    """What a module is called with."""
    if not node.all_input_nodes:
        raise NoStream(f"{node.target} is given no tensor")
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
