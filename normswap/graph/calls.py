"""The functional norms of a module, each read into a state as a norm module is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.graph.forward import Forward
from normswap.graph.functional import Call, forward_of, norm_calls
from normswap.norms.functional import FunctionalNorm, child_name
from normswap.norms.pool import BATCH, NOTHING, POSITION, RUNNING, Pool, Rule, per_group
from normswap.norms.standardization.rms import default_eps
from normswap.norms.state import NormState

__all__ = ["functional_norms", "holders", "own_class"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_NORMS = {
    "batch_norm": "bn",
    "instance_norm": "in",
    "layer_norm": "ln",
    "group_norm": "gn",
    "rms_norm": "rms",
}
_RMS = Pool("position", centred=False)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made of, if a conversion gave it a generated one."""
    cls: type[nn.Module] = vars(type(module)).get("_normswap_base", type(module))
    return cls


def holders(module: nn.Module) -> Iterator[nn.Module]:
    """The children whose tensors a module hands to norm functions without calling them."""
    forward = forward_of(own_class(module))
    for call in norm_calls(forward) if forward else ():
        for expression in call.arguments.values():
            attribute = forward.attribute(expression) if forward else None
            if attribute is not None and "." in attribute:
                yield module.get_submodule(attribute.rpartition(".")[0])


def functional_norms(module: nn.Module) -> Iterator[tuple[FunctionalNorm, str]]:
    """The calls of norm functions in a module's forward that are not yet norms of its own.

    Yields:
        What stands for the call, and why it cannot be converted; empty if it can.
    """
    if "forward" in vars(module):
        return
    forward = forward_of(own_class(module))
    for call in norm_calls(forward) if forward else ():
        name = child_name(call.kind, call.index)
        if not call.normalizes_input or name in module._modules or forward is None:
            continue
        words = f"F.{call.kind}, line {call.line}"
        try:
            state, refers = _Reading(module, forward, call).state()
        except LookupError as error:
            problem = f"its {error.args[0]}, so that what it computes is not known"
            yield FunctionalNorm(words, name, _unknown(call), {}), problem
        else:
            stub = FunctionalNorm(words, name, state, refers)
            stub.training = module.training
            stub.shared = any(forward.reads(attribute) > 1 for attribute in refers.values())
            yield stub, ""


def _unknown(call: Call) -> NormState:
    return NormState(norm="", kind=call.kind, num_features=0, rule=Rule.always(NOTHING))


class _Reading:
    """Reads one call of one module."""

    def __init__(self, module: nn.Module, forward: Forward, call: Call) -> None:
        self.module, self.forward, self.call = module, forward, call
        self.refers: dict[str, str] = {}

    def state(self) -> tuple[NormState, dict[str, str]]:
        """The state, and the owner's attributes that its tensors are.

        Raises:
            LookupError: with the name of an argument that is not the module's own.
        """
        if self.call.opaque:
            raise LookupError("arguments are unpacked")
        if parametrize.is_parametrized(self.module):
            raise LookupError("module is parametrized")
        tensors: dict[str, Any] = {name: self._tensor(name) for name in _TENSORS}
        kind = self.call.kind
        size = self._size(tensors)
        rule, settings = self._rule(size, tensors)
        given = self._value("eps", None if kind == "rms_norm" else 1e-5)
        eps = default_eps(tensors["weight"]) if given is None else given
        frozen = rule == Rule.always(RUNNING)
        momentum = self._value("momentum", 0.1)
        settings |= {"eps": given, "affine": tensors["weight"] is not None}
        state = NormState(
            norm="frozen_bn" if frozen else _NORMS[kind],
            kind=kind,
            num_features=size,
            rule=rule,
            eps=eps,
            momentum=momentum,
            channel_dim=-1 if kind in ("layer_norm", "rms_norm") else 1,
            settings=settings | ({} if "num_groups" in settings else {"momentum": momentum}),
            **tensors,
        )
        return state, self.refers

    def _rule(self, size: int, tensors: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
        kind = self.call.kind
        if kind == "batch_norm":
            train, evaluating = self._in_both_modes("training", False)
            modes = [BATCH if flag else RUNNING for flag in (train, evaluating)]
            tracked = tensors["running_mean"] is not None
            return Rule(*modes), {"sync": False, "track_running_stats": tracked}
        if kind == "instance_norm":
            train, evaluating = self._in_both_modes("use_input_stats", True)
            modes = [per_group(1) if flag else RUNNING for flag in (train, evaluating)]
            return Rule(*modes), {"track_running_stats": not evaluating}
        if kind == "group_norm":
            groups = self._value("num_groups", None)
            settings = {"num_groups": groups, "channels_per_group": size // groups}
            return Rule.always(per_group(size // groups)), settings
        return Rule.always(POSITION if kind == "layer_norm" else _RMS), {}

    def _size(self, tensors: dict[str, Any]) -> int:
        """The number of channels, by the tensors or the normalized shape."""
        for tensor in tensors.values():
            if tensor is not None:
                if tensor.ndim != 1:
                    raise LookupError("affine has several dimensions")
                return len(tensor)
        shape = self._value("normalized_shape", None)
        if shape is None:
            raise LookupError("number of channels is told by nothing")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(sizes) != 1:
            raise LookupError("normalized_shape has several dimensions")
        return int(sizes[0])

    def _tensor(self, name: str) -> Tensor | None:
        expression = self.call.arguments.get(name)
        if expression is None or (
            isinstance(expression, ast.Constant) and expression.value is None
        ):
            return None
        attribute = self.forward.attribute(expression)
        if attribute is None:
            raise LookupError(f"{name} is computed in the forward")
        if "." in attribute:
            raise LookupError(f"{name} is another module's, {attribute}")
        try:
            value = attrgetter(attribute)(self.module)
        except AttributeError:
            raise LookupError(f"{name} is not there") from None
        if value is not None:
            self.refers[name] = attribute
        return value  # type: ignore[no-any-return]

    def _value(self, name: str, default: Any) -> Any:
        return self._in_both_modes(name, default)[0]

    def _in_both_modes(self, name: str, default: Any) -> tuple[Any, Any]:
        expression = self.call.arguments.get(name)
        if expression is None:
            return default, default
        try:
            return (
                self.forward.value(self.module, expression, training=True),
                self.forward.value(self.module, expression, training=False),
            )
        except LookupError:
            raise LookupError(f"{name} is computed in the forward") from None
