"""The public functions that join the floors of the house."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from normswap.errors import NormSwapWarning
from normswap.graph.modules import walk
from normswap.graph.site import Sites
from normswap.integrations import install_loaded
from normswap.norms.fidelity import Fidelity
from normswap.norms.start import Carry
from normswap.swap.apply import apply_plan, undo
from normswap.swap.apply import revert as _revert
from normswap.swap.plan import Plan, Target, make_plan
from normswap.swap.report import Report
from normswap.swap.report import report as _report
from normswap.swap.select import Selector

__all__ = ["convert", "converted", "find", "plan", "report", "revert"]


def find(model: nn.Module, example_inputs: Any = None) -> Sites:
    """Find every normalization of a model.

    Modules are found by walking. What feeds a norm, what follows it and how often it is called
    is read from a torch.fx trace of a copy, made at the first question. The model is not touched.

    Args:
        model: any module.
        example_inputs: arguments for one forward in eval mode, to learn the input shapes: a
            tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Returns:
        The sites in the order of the model's modules; ``print()`` shows a table.
    """
    install_loaded()
    return walk(model, example_inputs)


def plan(
    model: nn.Module,
    to: Target,
    *,
    where: Selector | None = None,
    skip: Selector | None = None,
    example_inputs: Any = None,
    carry: Carry = "auto",
    strict: bool = False,
    min_fidelity: str | Fidelity | None = None,
    **options: Any,
) -> Plan:
    """Say what `convert` would do to every normalization, without touching the model.

    Args:
        model: any module that is not scripted, wrapped for ranks or compiled.
        to: a norm's name, a `normswap.spec`, or an ordered mapping of selectors to these, of
            which the first that matches wins and ``None`` leaves alone.
        where: what to convert: a glob on the path (``"layer1.*"``), ``"re:..."`` on the whole
            path, ``"kind:batch_norm"``, a module type, a predicate on the site, or a list of
            these. Default: the families that the target converts by default, see `list_norms`.
        skip: what to leave out, likewise.
        example_inputs: as for `find`; tells dimensions and sizes that nothing else tells.
        carry: ``"auto"``: the most faithful start there is; ``"copy"``: weight and bias as they
            are; ``"fresh"``: nothing.
        strict: raise if a chosen norm cannot be converted, instead of skipping it.
        min_fidelity: raise if one would be less faithful than this: ``"exact"``, ``"eval"``,
            ``"near"``, ``"calibrated"``, ``"matched"``, ``"affine"`` or ``"fresh"``.
        **options: the target's options, see `list_norms`.

    Returns:
        The plan; ``print()`` shows a table, ``apply()`` makes it happen.

    Raises:
        UnknownNorm: no norm has the name.
        OptionError: an option that the norm does not have or cannot take.
        NothingMatched: a selector matches nothing.
        NothingToConvert: no norm of the model is left to convert.
        UnsupportedModel: the model cannot be rewritten as it stands.
        TooUnfaithful: ``strict`` or ``min_fidelity`` cannot be kept.
    """
    install_loaded()
    return make_plan(
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


def convert(
    model: nn.Module,
    to: Target,
    *,
    where: Selector | None = None,
    skip: Selector | None = None,
    example_inputs: Any = None,
    carry: Carry = "auto",
    strict: bool = False,
    min_fidelity: str | Fidelity | None = None,
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
        min_fidelity: as for `plan`.
        inplace: convert the model itself (default), or a deep copy of it.
        **options: the target's options.

    Returns:
        The converted model: the same object, unless the model itself is a norm or ``inplace`` is
        false.

    Raises:
        NormSwapError: as for `plan`.

    Warns:
        NormSwapWarning: once, if norms were skipped or start with nothing carried.
    """
    if not inplace:
        model = copy.deepcopy(model)
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
    result = planned.apply()
    _warn(planned, fresh_wanted=carry == "fresh")
    return result


def _warn(planned: Plan, *, fresh_wanted: bool) -> None:
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
            stacklevel=3,
        )


def revert(model: nn.Module) -> nn.Module:
    """Put every normalization back as it was before the first conversion.

    Classes, settings and hooks are the first original's, also after several conversions. Values
    that were carried unchanged keep what they have become; values that a start rewrote come back
    as they were, on the model's present device and in its present precision.

    Args:
        model: a model, any part of it, or a copy; one that was never converted stays as it is.

    Returns:
        The reverted model: the same object, unless the model itself was a norm.
    """
    return _revert(model)


@contextmanager
def converted(model: nn.Module, to: Target, **arguments: Any) -> Iterator[nn.Module]:
    """Convert a model for the length of a ``with`` block.

    On leaving, also by an exception, its norms are those of before, earlier conversions included.

    Args:
        model: as for `plan`.
        to: as for `plan`.
        **arguments: everything else that `plan` takes.

    Yields:
        The converted model.
    """
    planned = plan(model, to, **arguments)
    applied = apply_plan(planned)
    try:
        _warn(planned, fresh_wanted=arguments.get("carry") == "fresh")
        yield applied.model
    finally:
        undo(applied)


def report(model: nn.Module) -> Report:
    """Tell what conversions did to a model, and what they had to leave.

    Args:
        model: a converted model, or a copy of one.

    Returns:
        Rows of path, source, target, fidelity and reason; ``print()`` shows a table.
    """
    return _report(model)
