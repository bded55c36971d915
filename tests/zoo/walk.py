"""The norms of a model, told without normswap: by the names of classes, and by watching a run."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

#: Classes that normalize, as libraries call them; what stands behind is an activation or a layout.
NORM = re.compile(
    r"^\w*?(Batch|Layer|Group|Instance|Rms|RMS|L2|Simple|GlobalResponse|FilterResponse|EvoNorm"
    r"|SplitBatch)Norm(Layer)?(Act|Tlu|Exp|Fp32|NoBias|Gated|alization|\dd|\d|[BS]\da?|_)*$"
    r"|^EvoNorm2d\w+$|^FrozenBatchNorm(Act)?2d$"
)


def norms_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose class is called a norm, by path; what is inside of one is its own."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if not inside and NORM.match(type(module).__name__):
            found[path] = module
    return found


def called(model: nn.Module, paths: list[str], inputs: Any) -> set[str]:
    """Which modules one run in eval mode calls."""
    seen: set[str] = set()
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.add(path)
        )
        for path in paths
    ]
    was = model.training
    try:
        with torch.no_grad():
            run(model.eval(), inputs)
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    return seen


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output for positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
