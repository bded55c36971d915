"""What readers share: the tensors and the layout of a module, whatever its family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.norms.base import Norm
from normswap.norms.renamed import names_of

__all__ = ["dimension", "has_parametrized_affine", "layout", "tensors"]


def tensors(module: nn.Module) -> dict[str, Any]:
    """The module's shared tensors under `NormState`'s names, absent ones as ``None``."""
    return {
        "weight": _tensor(module, "weight"),
        "bias": _tensor(module, "bias"),
        "running_mean": _tensor(module, "running_mean"),
        "running_var": _tensor(module, "running_var"),
        "num_batches_tracked": _tensor(module, "num_batches_tracked"),
        "parametrized": has_parametrized_affine(module),
        "names": names_of(module),
    }


def layout(module: nn.Module) -> dict[str, Any]:
    """Where the module's channels are and what runs after it, if it is a `Norm`."""
    if not isinstance(module, Norm):
        return {}
    return {
        "channel_dim": module.channel_dim,
        "flattens": module.flattens,
        "tail": module.tail,
    }


def has_parametrized_affine(module: nn.Module) -> bool:
    """Whether weight or bias is computed by `torch.nn.utils.parametrize`."""
    return parametrize.is_parametrized(module)


def dimension(module: nn.Module, *bases: type[nn.Module]) -> int | None:
    """How many dimensions follow the channels: 1, 2 or 3 by the place of its class in ``bases``."""
    for dim, base in enumerate(bases, start=1):
        if isinstance(module, base):
            return dim
    return None


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None
