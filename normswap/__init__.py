"""Find every normalization of a PyTorch model and swap it for another one.

>>> import normswap
>>> model = normswap.convert(model, to="sync_bn")
>>> normswap.warmup(model, loader)
>>> model = normswap.revert(model)

Importing this package imports nothing else: torch is loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.api import convert as convert
    from normswap.api import converted as converted
    from normswap.api import find as find
    from normswap.api import plan as plan
    from normswap.api import preserve_stats as preserve_stats
    from normswap.api import warmup as warmup
    from normswap.errors import NormSwapError as NormSwapError
    from normswap.errors import NormSwapWarning as NormSwapWarning
    from normswap.norms.registry import NormSpec as NormSpec
    from normswap.norms.registry import build as build
    from normswap.norms.registry import list_norms as list_norms
    from normswap.norms.registry import spec as spec
    from normswap.stats.report import WarmupReport as WarmupReport
    from normswap.swap.apply import revert as revert
    from normswap.swap.report import report as report

_WHERE = {
    "NormSpec": "norms.registry",
    "NormSwapError": "errors",
    "NormSwapWarning": "errors",
    "WarmupReport": "stats.report",
    "build": "norms.registry",
    "convert": "api",
    "converted": "api",
    "find": "api",
    "list_norms": "norms.registry",
    "plan": "api",
    "preserve_stats": "api",
    "report": "swap.report",
    "revert": "swap.apply",
    "spec": "norms.registry",
    "warmup": "api",
}

__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"normswap.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'normswap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
