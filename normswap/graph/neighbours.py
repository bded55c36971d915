"""What stands around each norm: what feeds it, what follows it, how often and when it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from operator import methodcaller
from typing import Any

import torch.fx
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap.graph.activations import ACTIVATION_NAMES, applied, is_activation
from normswap.graph.known import is_norm
from normswap.graph.recording import Recording, record
from normswap.graph.tracer import Trace, trace

__all__ = ["Neighbourhood", "Neighbours", "sole_reader"]

_LINEAR = (_ConvNd, nn.Linear)


@dataclass(frozen=True)
class Neighbours:
    """The surroundings of one norm.

    Args:
        producer: path of the convolution or linear whose output is the norm's input at every
            call, or ``None``.
        producers: paths of all convolutions and linears that feed it, at any call.
        consumer: path of the convolution or linear that alone reads the norm's output, or
            ``None``.
        previous: path of the norm before the producer, with at most an activation between.
        between: that activation, as a function of a tensor, or ``None``.
        feeds_alone: whether the producer's output is read by nothing but the norm.
        activation: what alone reads the norm's output: the path of an activation module or the
            name of an activation function, or ``None``.
        calls: how often one forward calls the norm, as far as the graphs tell.
        order: its place in the order of calls; ``None`` when it is never called.
    """

    producer: str | None = None
    producers: tuple[str, ...] = ()
    consumer: str | None = None
    previous: str | None = None
    between: Callable[..., Any] | None = None
    feeds_alone: bool = False
    activation: str | None = None
    calls: int = 0
    order: int | None = None


class Neighbourhood:
    """Answers about the surroundings of a model's norms; traces at the first question.

    Args:
        model: the model.
        example_inputs: arguments of one run to record; ``None`` to trace without.
        evaluating: whether that is run in eval mode, or as the modules are.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any = None, *, evaluating: bool = True
    ) -> None:
        self._model = model
        self._inputs = example_inputs
        self._evaluating = evaluating

    @cached_property
    def recording(self) -> Recording | None:
        """What a run on example inputs showed; ``None`` without them.

        Raises:
            Exception: whatever the forward raises.
        """
        if self._inputs is None:
            return None
        return record(self._model, self._inputs, evaluating=self._evaluating)

    @cached_property
    def trace(self) -> Trace:
        """The graphs that the answers are read from."""
        return trace(self._model) if self.recording is None else self.recording.trace

    def of(self, path: str) -> Neighbours | None:
        """The surroundings of the norm at a path, or ``None`` where no graph shows it."""
        hidden = path in self.blind or path.startswith(self._hidden)
        return self._norms.get(path, None if hidden else Neighbours())

    @cached_property
    def _hidden(self) -> tuple[str, ...]:
        """Prefixes of what may be called where no graph shows it: parts that are single nodes."""
        targets = {prefix + str(node.target) for node, prefix in self.seen}
        whole = (path for path in targets if not is_norm(self._modules[path]))
        return tuple(f"{path}." if path else "" for path in (*self.blind, *whole))

    @property
    def blind(self) -> dict[str, str]:
        """Why, by path, for modules whose forward could not be followed."""
        return self.trace.blind

    @property
    def unseen(self) -> Mapping[str, str]:
        """What modules were given, by path, that nothing seen has made."""
        return {} if self.recording is None else self.recording.unseen

    def calls(self, module: nn.Module) -> int:
        """How often one forward calls a module, as far as the graphs tell."""
        return self._calls[id(module)]

    def reads(self, path: str) -> bool:
        """Whether a forward reads tensors of the module at a path without calling it."""
        return path in self._read

    @cached_property
    def _read(self) -> set[str]:
        return {
            (fragment.prefix + str(node.target)).rpartition(".")[0]
            for fragment in self.trace.fragments
            for node in fragment.graph.nodes
            if node.op == "get_attr"
        }

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules(remove_duplicate=False))

    @cached_property
    def _calls(self) -> Counter[int]:
        return Counter(
            id(self._modules.get(prefix + str(node.target))) for node, prefix in self.seen
        )

    @cached_property
    def seen(self) -> list[tuple[torch.fx.Node, str]]:
        """Every call of a module in order, with the prefix of the graph that it is in."""
        return list(self._calls_in(None))

    def _calls_in(self, host: str | None) -> Iterator[tuple[torch.fx.Node, str]]:
        """The calls in the graphs of a host, with those of what it calls in their places."""
        for fragment in self.trace.fragments:
            if fragment.host != host:
                continue
            for node in fragment.graph.nodes:
                if node.op == "call_module":
                    yield node, fragment.prefix
                    yield from self._calls_in(fragment.prefix + str(node.target))

    @cached_property
    def _norms(self) -> dict[str, Neighbours]:
        first_path: dict[int, str] = {}
        for path, module in self._modules.items():
            first_path.setdefault(id(module), path)
        calls: dict[str, list[tuple[int, torch.fx.Node, str]]] = {}
        order = 0
        for node, prefix in self.seen:
            called = self._modules.get(prefix + str(node.target))
            if called is not None and is_norm(called):
                calls.setdefault(first_path[id(called)], []).append((order, node, prefix))
                order += 1
        return {path: _summary(seen, self._modules) for path, seen in calls.items()}


def _summary(
    calls: list[tuple[int, torch.fx.Node, str]], modules: dict[str, nn.Module]
) -> Neighbours:
    """What all calls of one norm, each with its place in the order and its prefix, agree on."""
    before = [_producer(node, prefix, modules) for _, node, prefix in calls]
    earlier = [_previous(node, prefix, modules) for _, node, prefix in calls]
    previous = _agreed([path for path, _ in earlier])
    return Neighbours(
        producer=_agreed([path for path, _ in before]),
        producers=tuple(dict.fromkeys(path for path, _ in before if path)),
        consumer=_agreed([_consumer(node, prefix, modules) for _, node, prefix in calls]),
        previous=previous,
        between=earlier[0][1] if previous else None,
        feeds_alone=all(alone for _, alone in before),
        activation=_agreed([_activation(node, prefix, modules) for _, node, prefix in calls]),
        calls=len(calls),
        order=calls[0][0],
    )


def _agreed(answers: list[str | None]) -> str | None:
    """The one answer that all calls give, or ``None``."""
    return answers[0] if len(set(answers)) == 1 else None


def _producer(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> tuple[str | None, bool]:
    """The layer that feeds a call, through identities, and whether it feeds nothing else."""
    source, alone = _source(node, prefix, modules)
    path = prefix + str(source.target) if source is not None else ""
    return (path, alone) if isinstance(modules.get(path), _LINEAR) else (None, False)


def _previous(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> tuple[str | None, Callable[..., Any] | None]:
    """The norm before the layer that feeds a call, and the activation between the two."""
    layer, _ = _source(node, prefix, modules)
    if layer is None or not isinstance(modules.get(prefix + str(layer.target)), _LINEAR):
        return None, None
    source, _ = _source(layer, prefix, modules)
    between = None if source is None else _as_function(source, prefix, modules)
    if source is not None and between is not None:
        source, _ = _source(source, prefix, modules)
    path = "" if source is None else prefix + str(source.target)
    module = modules.get(path) if source is not None and source.op == "call_module" else None
    return (path, between) if module is not None and is_norm(module) else (None, None)


def _source(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> tuple[torch.fx.Node | None, bool]:
    """The call whose output a call reads, past identities, and whether nothing else reads that."""
    alone, source = True, _first_input(node)
    while isinstance(source, torch.fx.Node) and source.op.startswith("call"):
        alone = alone and len(source.users) == 1
        module = modules.get(prefix + str(source.target)) if source.op == "call_module" else None
        if not isinstance(module, nn.Identity):
            return source, alone
        source = _first_input(source)
    return None, False


def _as_function(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> Callable[..., Any] | None:
    """The activation that a node is, as a function of a tensor, or ``None``."""
    if node.op == "call_module":
        module = modules.get(prefix + str(node.target))
        return module if is_activation(module) else None
    name, further = getattr(node.target, "__name__", str(node.target)), node.args[1:]
    given = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if name not in ACTIVATION_NAMES or len(node.all_input_nodes) != 1:
        return None
    called = methodcaller(name) if isinstance(node.target, str) else node.target
    return partial(applied, called, further, given)


def _first_input(node: torch.fx.Node) -> object:
    """What a module is called with first, by position or by keyword."""
    return next(iter((*node.args, *node.kwargs.values())), None)


def sole_reader(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> tuple[str, nn.Module | None] | None:
    """What alone reads a call's output, past identities, or ``None``.

    Returns:
        Path and module if it is a module, else the name of a function.
    """
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_module":
            return getattr(node.target, "__name__", str(node.target)), None
        path = prefix + str(node.target)
        module = modules.get(path)
        if not isinstance(module, nn.Identity):
            return path, module
    return None


def _consumer(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    found = sole_reader(node, prefix, modules)
    return found[0] if found and isinstance(found[1], _LINEAR) else None


def _activation(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    found = sole_reader(node, prefix, modules)
    if found is None:
        return None
    name, module = found
    known = name in ACTIVATION_NAMES if module is None else is_activation(module)
    return name if known else None
