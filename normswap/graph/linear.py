"""Layers and calls that are linear in their last step: which of their tensors make the channels."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import nn

__all__ = ["channels_of_call", "channels_of_layer", "computes_as"]


def channels_of_layer(module: nn.Module) -> tuple[int, dict[str, int]]:
    """Where the channels of a layer's output are, and in which of its parameters.

    Returns:
        A dimension of the output, and dimensions of parameters by name; no names for a layer that
        is not known.
    """
    known: Any = module
    if computes_as(known, nn.Linear):
        return -1, {"weight": 0, "bias": 0}
    if computes_as(known, nn.Conv1d, nn.Conv2d, nn.Conv3d) and known.groups == 1:
        return 1, {"weight": 0, "bias": 0}
    if computes_as(known, nn.Embedding) and known.max_norm is None:
        return -1, {"weight": 1}
    if _is_conv1d(known):
        return -1, {"weight": 1, "bias": 0}
    return -1, {}


def channels_of_call(node: torch.fx.Node) -> tuple[torch.fx.Node, list[torch.fx.Node]]:
    """The weight and bias of a call, of which the first dimensions make its last one.

    Args:
        node: what the call makes, or the first of that.

    Returns:
        The call, and what it is given; nothing for one that is not known.
    """
    called, name = node, _name(node)
    if name == "_getitem" and node.args[1] == 0:
        called = node.all_input_nodes[0]
        name = _name(called)
    given: list[Any] = []
    if called is node and name == "linear":
        given = [*called.args[1:], *(called.kwargs.get(key) for key in ("weight", "bias"))]
    elif called is not node and name == "multi_head_attention_forward":
        given = list(called.args[11:13])
    nodes = [each for each in given if isinstance(each, torch.fx.Node)]
    return called, nodes if all(each.op == "get_attr" for each in nodes) else []


def computes_as(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module computes what one of torch's classes does."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear of GPT-2 in transformers, whose weight is (in, out)."""
    cls = type(module)
    known = (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return known and "forward" not in vars(module)


def _name(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
