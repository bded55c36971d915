"""The public functions that join the floors of the house."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from normswap.errors import NormSwapWarning
from normswap.graph import modules
from normswap.integrations import install_loaded
from normswap.norms.fidelity import Fidelity
from normswap.norms.start import Carry
from normswap.stats import keeping
from normswap.stats import warmup as _warmup
from normswap.stats.calibration import calibrate as _calibrate
from normswap.stats.calibration import conversion
from normswap.swap import planning, storage
from normswap.swap import recipe as _recipe
from normswap.swap.apply import apply_steps, undo
from normswap.swap.plan import Plan
from normswap.swap.select import Selector
from normswap.swap.targets import To

__all__ = [
    "apply_recipe",
    "calibrate",
    "convert",
    "converted",
    "find",
    "load",
    "plan",
    "preserve_stats",
    "recipe",
    "save",
    "warmup",
]

P = ParamSpec("P")
R = TypeVar("R")


def _informed(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which first learns from the libraries that are loaded by now."""

    @wraps(function)
    def informed(*args: P.args, **kwargs: P.kwargs) -> R:
        install_loaded()
        return function(*args, **kwargs)

    return informed


find = _informed(modules.find)
plan = _informed(planning.plan)
apply_recipe = _informed(_recipe.apply_recipe)
recipe = _informed(_recipe.recipe)
save = _informed(storage.save)
load = _informed(storage.load)
warmup = _informed(_warmup.warmup)
calibrate = _informed(_calibrate.calibrate)
preserve_stats = _informed(keeping.preserve_stats)


def convert(
    model: nn.Module,
    to: To,
    *,
    where: Selector | None = None,
    skip: Selector | None = None,
    example_inputs: Any = None,
    carry: Carry = "auto",
    strict: bool = False,
    min_fidelity: str | Fidelity | None = None,
    calibrate: Iterable[Any] | None = None,
    inplace: bool = True,
    **options: Any,
) -> nn.Module:
    """Turn the normalizations of a model into another one, with all that they have learnt.

    Weights, running statistics, eps, momentum, mode, hooks, device, dtype, fused activations and
    the keys of the state dict survive. All or nothing: on any exception, a keyboard interrupt
    included, the model is as it was. Done twice it equals once. `revert` takes it back.

    Args:
        model: as for `plan`.
        to: as for `plan`.
        where: as for `plan`.
        skip: as for `plan`.
        example_inputs: as for `plan`.
        carry: as for `plan`.
        strict: as for `plan`.
        min_fidelity: as for `plan`; norms that will be calibrated count as that.
        calibrate: batches to fit those new norms on that cannot start as the source in eval mode,
            as `normswap.calibrate` does. The first batch serves as ``example_inputs`` if there
            are none.
        inplace: convert the model itself (default), or a deep copy of it.
        **options: the target's options.

    Returns:
        The converted model: the same object, unless the model itself is a norm or ``inplace`` is
        false.

    Raises:
        NormSwapError: as for `plan` and `normswap.calibrate`.

    Warns:
        NormSwapWarning: once, if norms were skipped or start with nothing carried.
    """
    if not inplace:
        model = copy.deepcopy(model)
    fitting = None if calibrate is None else conversion.Fitting(model, calibrate, min_fidelity)
    if fitting is not None:
        min_fidelity = fitting.planned_fidelity
        example_inputs = fitting.first_inputs() if example_inputs is None else example_inputs
    planned = plan(
        model,
        to,
        where=where,
        skip=skip,
        example_inputs=example_inputs,
        carry=carry,
        strict=strict,
        min_fidelity=min_fidelity,
        **options,
    )
    _warn(planned, fresh_wanted=carry == "fresh", stacklevel=3)
    applied = apply_steps(model, planned)
    if fitting is not None:
        with applied.taken_back_on_failure():
            fitting.fit(applied.model)
    return applied.model


def _warn(planned: Plan, *, fresh_wanted: bool, stacklevel: int) -> None:
    """Warn of what will be skipped or lost, before anything is done: a warning may be an error."""
    skipped = planned.of("skip")
    fresh = [
        step
        for step in planned.of("convert")
        if step.fidelity is Fidelity.FRESH and not fresh_wanted
    ]
    messages = []
    if skipped:
        messages.append(
            f"{len(skipped)} were skipped, such as {skipped[0].site.label}: {skipped[0].reason}"
        )
    if fresh:
        messages.append(
            f"{len(fresh)} start with nothing carried, such as {fresh[0].site.label} to "
            f"{fresh[0].to}"
        )
    if messages:
        warnings.warn(
            f"of {len(planned)} normalizations {'; '.join(messages)}. "
            "print(normswap.report(model)) shows all.",
            NormSwapWarning,
            stacklevel=stacklevel,
        )


@contextmanager
def converted(model: nn.Module, to: To, **arguments: Any) -> Iterator[nn.Module]:
    """Convert a model for the length of a ``with`` block.

    On leaving, also by an exception, its norms are those of before, earlier conversions included.
    Inside, `revert` goes back no further than that.

    Args:
        model: as for `plan`.
        to: as for `plan`.
        **arguments: everything else that `plan` takes.

    Yields:
        The converted model.
    """
    planned = plan(model, to, **arguments)
    # One frame more than convert: the context manager's own.
    _warn(planned, fresh_wanted=arguments.get("carry") == "fresh", stacklevel=4)
    applied = apply_steps(model, planned, scoped=True)
    try:
        yield applied.model
    finally:
        undo(applied)
