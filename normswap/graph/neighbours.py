"""What stands around each norm: what feeds it, what follows it, how often and when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.fx
from torch import nn
from torch.nn.modules.conv import _ConvNd

from normswap.graph.tracer import Trace, trace
from normswap.norms.registry import reader

__all__ = ["Neighbourhood", "Neighbours"]

_ACTIVATION_NAMES = frozenset(
    name.lower() for name in torch.nn.modules.activation.__all__ if name != "MultiheadAttention"
) | {"relu_", "silu_", "hardswish_", "leaky_relu", "hard_sigmoid", "log_softmax"}


@dataclass(frozen=True)
class Neighbours:
    """The surroundings of one norm.

    Args:
        producer: path of the convolution or linear whose output is the norm's input at every
            call, or ``None``.
        activation: what alone reads the norm's output: the path of an activation module or the
            name of an activation function, or ``None``.
        calls: how often one forward calls the norm, as far as the graphs tell.
        order: its place in the order of calls; ``None`` when it is never called.
    """

    producer: str | None = None
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
        return self._norms.get(path)

    @cached_property
    def _norms(self) -> dict[str, Neighbours]:
        modules = dict(self._model.named_modules(remove_duplicate=False))
        first_path: dict[int, str] = {}
        for path, module in modules.items():
            first_path.setdefault(id(module), path)
        calls: dict[str, list[tuple[int, torch.fx.Node, str]]] = {}
        order = 0
        for fragment in self.trace.fragments:
            for node in fragment.graph.nodes:
                if node.op != "call_module":
                    continue
                module = modules.get(fragment.prefix + str(node.target))
                if module is None or reader(type(module)) is None:
                    continue
                calls.setdefault(first_path[id(module)], []).append((order, node, fragment.prefix))
                order += 1
        return {path: _summary(seen, modules) for path, seen in calls.items()}


def _summary(
    calls: list[tuple[int, torch.fx.Node, str]], modules: dict[str, nn.Module]
) -> Neighbours:
    """What all calls of one norm, each with its place in the order and its prefix, agree on."""
    return Neighbours(
        producer=_agreed([_producer(node, prefix, modules) for _, node, prefix in calls]),
        activation=_agreed([_activation(node, prefix, modules) for _, node, prefix in calls]),
        calls=len(calls),
        order=calls[0][0],
    )


def _agreed(answers: list[str | None]) -> str | None:
    """The one answer that all calls give, or ``None``."""
    return answers[0] if len(set(answers)) == 1 else None


def _producer(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    source = node.args[0] if node.args else None
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        path = prefix + str(source.target)
        module = modules.get(path)
        if isinstance(module, (_ConvNd, nn.Linear)):
            return path
        if not isinstance(module, nn.Identity) or not source.args:
            return None
        source = source.args[0]
    return None


def _activation(node: torch.fx.Node, prefix: str, modules: dict[str, nn.Module]) -> str | None:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_module":
            name = getattr(node.target, "__name__", str(node.target))
            return name if name in _ACTIVATION_NAMES else None
        path = prefix + str(node.target)
        module = modules.get(path)
        if not isinstance(module, nn.Identity):
            return path if type(module).__name__.lower() in _ACTIVATION_NAMES else None
    return None
