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
    from normswap.api import apply_recipe as apply_recipe
    from normswap.api import calibrate as calibrate
    from normswap.api import convert as convert
    from normswap.api import converted as converted
    from normswap.api import find as find
    from normswap.api import load as load
    from normswap.api import plan as plan
    from normswap.api import preserve_stats as preserve_stats
    from normswap.api import recipe as recipe
    from normswap.api import save as save
    from normswap.api import warmup as warmup
    from normswap.errors import InputError as InputError
    from normswap.errors import NormSwapError as NormSwapError
    from normswap.errors import NormSwapWarning as NormSwapWarning
    from normswap.norms.base import Norm as Norm
    from normswap.norms.fidelity import Fidelity as Fidelity
    from normswap.norms.inputs.kinds import ExtraInput as ExtraInput
    from normswap.norms.inputs.kinds import Form as Form
    from normswap.norms.inputs.norm import InputNorm as InputNorm
    from normswap.norms.pool import Pool as Pool
    from normswap.norms.pool import Rule as Rule
    from normswap.norms.registry import list_norms as list_norms
    from normswap.norms.registry import register as register
    from normswap.norms.spec import NormSpec as NormSpec
    from normswap.norms.spec import build as build
    from normswap.norms.spec import spec as spec
    from normswap.norms.standardization.filter_response import TLU as TLU
    from normswap.norms.start import Start as Start
    from normswap.norms.start import begin as begin
    from normswap.norms.state import NormState as NormState
    from normswap.norms.statistics.sparse_switchable import set_radius as set_radius
    from normswap.stats.calibration.report import CalibrationReport as CalibrationReport
    from normswap.stats.channel_stats import DatasetStats as DatasetStats
    from normswap.stats.dataset import dataset_stats as dataset_stats
    from normswap.stats.report import WarmupReport as WarmupReport
    from normswap.swap.apply import revert as revert
    from normswap.swap.inputs import given as given
    from normswap.swap.inputs import inputs as inputs
    from normswap.swap.report import report as report
    from normswap.swap.style import style_features as style_features
    from normswap.views.norm_picture import draw as draw
    from normswap.views.norm_text import draw_text as draw_text

_WHERE = {
    "CalibrationReport": "stats.calibration.report",
    "DatasetStats": "stats.channel_stats",
    "ExtraInput": "norms.inputs.kinds",
    "Fidelity": "norms.fidelity",
    "Form": "norms.inputs.kinds",
    "InputError": "errors",
    "InputNorm": "norms.inputs.norm",
    "Norm": "norms.base",
    "NormSpec": "norms.spec",
    "NormState": "norms.state",
    "NormSwapError": "errors",
    "NormSwapWarning": "errors",
    "Pool": "norms.pool",
    "Rule": "norms.pool",
    "Start": "norms.start",
    "TLU": "norms.standardization.filter_response",
    "WarmupReport": "stats.report",
    "apply_recipe": "api",
    "begin": "norms.start",
    "build": "norms.spec",
    "calibrate": "api",
    "convert": "api",
    "converted": "api",
    "dataset_stats": "stats.dataset",
    "draw": "views.norm_picture",
    "draw_text": "views.norm_text",
    "find": "api",
    "given": "swap.inputs",
    "inputs": "swap.inputs",
    "list_norms": "norms.registry",
    "load": "api",
    "plan": "api",
    "recipe": "api",
    "register": "norms.registry",
    "preserve_stats": "api",
    "report": "swap.report",
    "revert": "swap.apply",
    "save": "api",
    "set_radius": "norms.statistics.sparse_switchable",
    "spec": "norms.spec",
    "style_features": "swap.style",
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
