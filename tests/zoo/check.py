"""One model through everything: found, planned, converted, run and reverted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import normswap
from tests.zoo.libraries import Zoo
from tests.zoo.walk import called, norms_by_name, run

#: Up to how many parameters a model is run on real numbers, too.
SMALL = 3_000_000

#: What outputs may differ by where a conversion is exact, relative to the largest.
TOLERANCE = 1e-5


def check(zoo: Zoo, name: str, targets: Sequence[str], where: str | None = None) -> dict[str, Any]:
    """Everything that holds or does not hold of a model, as JSON takes it."""
    with torch.device("meta"):
        model = zoo.build(name)
        inputs = zoo.inputs(name, model, "meta", 2)
    result: dict[str, Any] = {"model": name, "problems": []}
    say = result["problems"].append
    started = time.perf_counter()
    sites = normswap.find(model)
    result["find_s"] = time.perf_counter() - started
    walked = norms_by_name(model)
    found = {site.path for site in sites if site.origin == "module"}
    result |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "norms": len(sites),
        "kinds": sites.counts(),
        "unrecognised": sorted(set(sites.unrecognised.values())),
        "functional": sum(site.origin != "module" for site in sites),
        "targets": {},
    }
    missed = walked.keys() - found - sites.unrecognised.keys()
    for path in sorted(missed)[:3]:
        say(f"not found: {path} ({type(walked[path]).__name__})")
    for path in sorted(found - walked.keys())[:3]:
        say(f"found, and not called a norm: {path} ({type(model.get_submodule(path)).__name__})")
    try:
        calls = called(model, sorted(found | walked.keys()), inputs)
        result["called"] = len(calls)
    except Exception as error:
        result["not_run"] = f"on meta: {type(error).__name__}: {error}"[:200]
        inputs = None
    for to in targets:
        result["targets"][to] = _through(model, to, where, inputs, say)
    if result["parameters"] <= SMALL:
        real = zoo.build(name)
        for to in targets:
            numbers = zoo.inputs(name, real, "cpu", 2)
            result["targets"][to] |= _on_numbers(real, to, where, numbers, say)
    return result


def _through(model: Any, to: str, where: str | None, inputs: Any, say: Any) -> dict[str, Any]:
    """Convert, run forward and backward, and revert, without weights."""
    before = _holdings(model)
    started = time.perf_counter()
    told: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planned = normswap.plan(model, to, where=where)
            converted = planned.apply()
    except normswap.errors.NormSwapError as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    told["convert_s"] = time.perf_counter() - started
    told["converted"] = len(planned.of("convert"))
    told["left"] = len(planned.of("skip"))
    told["skipped"] = sorted({step.reason for step in planned.of("skip")})[:5]
    if inputs is not None:
        try:
            converted.train()  # in eval some keep what they computed, and its graph, for ever
            loss = sum(each.float().sum() for each in _floats(run(converted, inputs)))
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
        except Exception as error:
            say(f"{to}: does not run: {type(error).__name__}: {error}"[:300])
        converted.eval()
    for parameter in converted.parameters():
        parameter.grad = None
    started = time.perf_counter()
    reverted = normswap.revert(converted)
    told["revert_s"] = time.perf_counter() - started
    if reverted is not model or _holdings(model) != before:
        say(f"{to}: reverted, and not what it was")
    return told


def _on_numbers(model: Any, to: str, where: str | None, inputs: Any, say: Any) -> dict[str, Any]:
    """Whether outputs hold what fidelities promise, and come back to the bit."""
    with torch.no_grad():
        before = [each.clone() for each in _floats(run(model, inputs))]
        if not before or not all(each.isfinite().all() for each in before):
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                planned = normswap.plan(model, to, where=where)
                planned.apply()
        except normswap.errors.NormSwapError:
            return {}
        try:
            after = _floats(run(model, inputs))
            steps = planned.of("convert")
            exact = all(str(step.fidelity) in ("exact", "eval") for step in steps)
            off = max(_distance(a, b) for a, b in zip(after, before, strict=True))
            if exact and off > TOLERANCE:
                say(f"{to}: exact, and outputs differ by {off:.2g}")
        except Exception as error:
            say(f"{to}: does not run on numbers: {type(error).__name__}: {error}"[:300])
            exact, off = False, float("nan")
        normswap.revert(model)
        again = _floats(run(model, inputs))
        if not all(torch.equal(a, b) for a, b in zip(again, before, strict=True)):
            say(f"{to}: reverted, and outputs differ")
    return {"exact": exact, "differs": off}


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def _holdings(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module's class, parameters, and the forms of its buffers, which a move makes anew."""
    return [
        (
            path,
            type(module),
            *((name, id(tensor)) for name, tensor in module._parameters.items()),
            *((name, _form(tensor)) for name, tensor in module._buffers.items()),
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, of whatever form."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for each in output for tensor in _floats(each)]
    return []
