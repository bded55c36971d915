"""What stands around each norm: what feeds it, what follows it, how often and when it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch.fx
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap.graph.tracer import Trace, trace
from normswap.norms.registry import reader

__all__ = ["Neighbourhood", "Neighbours"]

_LINEAR = (_ConvNd, nn.Linear)
_ACTIVATION_NAMES = frozenset(
    name.lower() for name in torch.nn.modules.activation.__all__ if name != "MultiheadAttention"
) | {"relu_", "silu_", "hardswish_", "leaky_relu", "hard_sigmoid", "log_softmax"}


@dataclass(frozen=True)
class Neighbours:
    """The surroundings of one norm.

    Args:
        producer: path of the convolution or linear whose output is the norm's input at every
            call, or ``None``.
        producers: paths of all convolutions and linears that feed it, at any call.
        consumer: path of the convolution or linear that alone reads the norm's output, or
            ``None``.
        feeds_alone: whether the producer's output is read by nothing but the norm.
        activation: what alone reads the norm's output: the path of an activation module or the
            name of an activation function, or ``None``.
        calls: how often one forward calls the norm, as far as the graphs tell.
        order: its place in the order of calls; ``None`` when it is never called.
    """

    producer: str | None = None
    producers: tuple[str, ...] = ()
    consumer: str | None = None
    feeds_alone: bool = False
    activation: str | None = None
    calls: int = 0
    order: int | None = None


class Neighbourhood:
    """Answers about the surroundings of a model's norms; traces at the first question."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def trace(self) -> Trace:
        """The graphs that the answers are read from."""
        return trace(self._model)

    def of(self, path: str) -> Neighbours | None:
        """The surroundings of the norm at a path, or ``None`` where no graph shows it."""
        hidden = path in self.blind or path.startswith(self._hidden)
        return self._norms.get(path, None if hidden else Neighbours())

    @cached_property
    def _hidden(self) -> tuple[str, ...]:
        """Prefixes of what may be called where no graph shows it: parts that are single nodes."""
        targets = {prefix + str(node.target) for node, prefix in self._seen}
        whole = (path for path in targets if reader(type(self._modules[path])) is None)
        return tuple(f"{path}." if path else "" for path in (*self.blind, *whole))

    @property
    def blind(self) -> dict[str, str]:
        """Why, by path, for modules whose forward could not be followed."""
        return self.trace.blind

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
            id(self._modules.get(prefix + str(node.target))) for node, prefix in self._seen
        )

    @cached_property
    def _seen(self) -> list[tuple[torch.fx.Node, str]]:
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
        for node, prefix in self._seen:
            called = self._modules.get(prefix + str(node.target))
            if called is not None and reader(type(called)) is not None:
                calls.setdefault(first_path[id(called)], []).append((order, node, prefix))
                order += 1
        return {path: _summary(seen, self._modules) for path, seen in calls.items()}


def _summary(
    calls: list[tuple[int, torch.fx.Node, str]], modules: dict[str, nn.Module]
) -> Neighbours:
    """What all calls of one norm, each with its place in the order and its prefix, agree on."""
    before = [_producer(node, prefix, modules) for _, node, prefix in calls]
    return Neighbours(
        producer=_agreed([path for path, _ in before]),
        producers=tuple(dict.fromkeys(path for path, _ in before if path)),
        consumer=_agreed([_consumer(node, prefix, modules) for _, node, prefix in calls]),
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
    alone = True
    source = _first_input(node)
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        alone = alone and len(source.users) == 1
        path = prefix + str(source.target)
        module = modules.get(path)
        if isinstance(module, _LINEAR):
            return path, alone
        if not isinstance(module, nn.Identity):
            break
        source = _first_input(source)
    return None, False


def _first_input(node: torch.fx.Node) -> object:
    """What a module is called with first, by position or by keyword."""
    return next(iter((*node.args, *node.kwargs.values())), None)


def _reader(
    node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]
) -> tuple[torch.fx.Node, str, nn.Module | None] | None:
    """What alone reads a call's output, past identities: node, and path and module if it is one."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        path = prefix + str(node.target)
        module = modules.get(path) if node.op == "call_module" else None
        if not isinstance(module, nn.Identity):
            return node, path, module
    return None


def _consumer(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    found = _reader(node, prefix, modules)
    return found[1] if found and isinstance(found[2], _LINEAR) else None


def _activation(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    found = _reader(node, prefix, modules)
    if found is None:
        return None
    user, path, module = found
    if module is not None:
        return path if type(module).__name__.lower() in _ACTIVATION_NAMES else None
    name = getattr(user.target, "__name__", str(user.target))
    return name if name in _ACTIVATION_NAMES else None
