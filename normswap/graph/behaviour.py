"""Unknown modules that behave like norms: asked by inputs what they do, and believed when rebuilt.

A module is run on numbers of its own, in double precision: a copy without the model's tensors,
hooks and mode. What is asked, in this order:

* Is ``y(x) + y(-x)`` twice an offset of each channel? Then the rest is odd, as standardization is.
* Which standardization of large inputs, where eps does not count, is the rest a gain times?
* Which of its parameters are gain and offset, and is it ``weight`` or ``1 + weight``?
* What is added under the root? Small inputs tell.
* Does the formula that this makes give the module's outputs, on fresh inputs of other sizes?

Only a module that passes the last is taken for a norm. What its class is called counts for
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normswap.graph.candidates import arguments, is_candidate
from normswap.graph.standardizing import Layout, layouts, pools, spread, standardized
from normswap.graph.subject import Subject
from normswap.norms.counts import PLAIN, Counts
from normswap.norms.pool import RUNNING, Pool, Rule
from normswap.randomness import kept_random_state

__all__ = ["Behaviour", "Unexplained", "behaviour_of", "explained"]

_OVER = {
    "position": "the channels of a position",
    "group": "a group of channels of a sample",
    "batch": "the batch",
    "running": "all data, as kept",
}

#: What a rebuilt output may differ by, relative to the largest: the rounding of single precision,
#: which many a norm computes in whatever it is given.
TOLERANCE = 1e-6

#: Standard deviation of inputs beside which no eps counts, and of inputs beside which any does.
LARGE, SMALL = 1e4, 1e-7


@dataclass(frozen=True)
class Behaviour:
    """What a module was found to compute.

    Args:
        rule: what it pools over.
        layout: where its channels are, in which inputs.
        num_features: C.
        eps: added under the root, to the biased variance.
        names: of its attributes that are weight, bias and running statistics.
        counts: how weight and bias enter.
        dim: how many dimensions follow the channels, if it takes only as many.
    """

    rule: Rule
    layout: Layout
    num_features: int
    eps: float
    names: Mapping[str, str] = field(default_factory=dict)
    counts: Counts = PLAIN
    dim: int | None = None

    @property
    def words(self) -> str:
        """What was found, for people."""
        pool = self.rule.train
        of = "mean and variance" if pool.centred else "mean square"
        gain = f"{'1 + ' if self.counts.base else ''}{self.names.get('weight', '')}"
        parts = [f"{of} over {_OVER[pool.over]}", f"eps {self.eps:.3g}"]
        parts += [f"gain {gain}"] if "weight" in self.names else []
        parts += [f"offset {self.names['bias']}"] if "bias" in self.names else []
        return "by behaviour: " + ", ".join(parts)


@dataclass(frozen=True)
class Unexplained:
    """A module that might be a norm and is none that could be confirmed, and why."""

    reason: str


def behaviour_of(module: nn.Module) -> Behaviour | Unexplained | None:
    """Tell what a module of an unknown class computes; ``None`` if it is no candidate.

    The module is not touched or run; a copy of it is.
    """
    if not is_candidate(module):
        return None
    names = arguments(type(module))
    if len(names) != 1:
        told = ", ".join(names) or "nothing"
        return Unexplained(f"its forward takes {told}, where a norm takes one tensor")
    return explained(module)


def explained(module: nn.Module) -> Behaviour | Unexplained:
    """Tell what a module of one tensor computes."""
    try:
        with torch.no_grad(), kept_random_state():
            return _explained(module)
    except Exception as error:  # it is somebody's code on inputs that it was not made for
        return Unexplained(f"it could not be tried: {type(error).__name__}")


def _explained(module: nn.Module) -> Behaviour | Unexplained:
    subject = Subject(module, torch.float64)
    size = subject.channels
    if not size:
        return Unexplained("it has no weight that tells its number of channels")
    taken = [layout for layout in layouts(size) if subject.takes(layout)]
    if not taken:  # it casts its input to single precision, and not its weights
        subject = Subject(module, torch.float32)
        taken = [layout for layout in layouts(size) if subject.takes(layout)]
    nearest = "no standardization has its outputs"
    for layout in taken:
        for found in _guesses(subject, layout):
            problem = _misfit(subject, found)
            if not problem:
                return replace(found, dim=_dim(subject, layout))
            nearest = problem
    return Unexplained(nearest)


def _dim(subject: Subject, layout: Layout) -> int | None:
    """How many dimensions follow the channels, if there is only one number that it takes."""
    alike = [each for each in layouts(subject.channels) if each.channel_dim == layout.channel_dim]
    dims = {each.dim for each in alike if each == layout or subject.takes(each)}
    return dims.pop() if layout.channel_dim == 1 and len(dims) == 1 else None


def _guesses(subject: Subject, layout: Layout) -> Iterator[Behaviour]:
    """What explains its outputs in training on large inputs, with the eps that small ones tell."""
    x = subject.inputs(layout.shape)
    plus, minus = (subject.run(sign * LARGE * x, training=True) for sign in (1, -1))
    even, odd = (plus + minus) / 2, (plus - minus) / 2
    offset = layout.of_channels(even)
    if not _alike(even, layout.beside(offset), float(odd.abs().max())):
        return
    yield from _frozen(subject, layout, layout.of_channels(odd * x) / layout.of_channels(x * x))
    for pool in pools(subject.channels, layout):
        shape = standardized(x, layout, pool, 0.0)
        gain = layout.of_channels(odd * shape) / layout.of_channels(shape * shape)
        if not _alike(odd, layout.beside(gain) * shape):
            continue
        eps = _eps(subject, layout, pool, gain, offset)
        for names, counts in _affine(subject, layout, pool, gain, offset):
            for running in _running(subject) if pool.meets else [{}]:
                rule = Rule(pool, RUNNING if running else pool)
                yield Behaviour(rule, layout, gain.numel(), eps, {**names, **running}, counts)


def _frozen(subject: Subject, layout: Layout, slope: Tensor) -> Iterator[Behaviour]:
    """What is explained by running statistics alone, in training too."""
    slope = slope / LARGE
    at_zero = layout.of_channels(subject.run(slope.new_zeros(layout.shape), training=True))
    held = {**subject.parameters, **subject.buffers}
    for names in itertools.permutations(held, 4):
        weight, bias, mean, var = (held[name] for name in names)
        eps = (weight / slope).square() - var
        constant = _alike(eps, eps.mean(), float(var.abs().max()))
        if constant and _alike(at_zero, bias - mean * slope):
            found = _told(subject, float(eps.mean()))
            terms = ("weight", "bias", "running_mean", "running_var")
            named = dict(zip(terms, names, strict=True))
            yield Behaviour(Rule.always(RUNNING), layout, slope.numel(), found, named)


def _affine(
    subject: Subject, layout: Layout, pool: Pool, gain: Tensor, offset: Tensor
) -> Iterator[tuple[dict[str, str], Counts]]:
    """Gain and offset as what they are made of."""
    bias = _same(subject.parameters, offset)
    if not bias and not _alike(offset, torch.zeros_like(offset), float(gain.abs().max())):
        return
    factors, one = [1.0], torch.ones_like(gain)
    if pool.over == "position":  # an unbiased variance is a factor only of always as many values
        factors.append(math.sqrt((len(gain) - 1) / len(gain)))
    for name, tensor in (*subject.parameters.items(), ("", one)):
        for factor in factors:
            for base in (0.0, 1.0) if name else (0.0,):
                if _alike(gain, factor * (tensor + base)) and (name or factor == 1.0):
                    names = {"weight": name, "bias": bias}
                    counts = Counts(of_weight=factor, base=factor * base)
                    yield {key: held for key, held in names.items() if held}, counts


def _running(subject: Subject) -> Iterator[dict[str, str]]:
    """Which of its buffers may be running mean and variance, or neither."""
    for mean, var in itertools.permutations(subject.buffers, 2):
        yield {"running_mean": mean, "running_var": var}
    if not subject.buffers:
        yield {}


def _eps(subject: Subject, layout: Layout, pool: Pool, gain: Tensor, offset: Tensor) -> float:
    """What is added to the variance: in small inputs nothing else is left of it."""
    x = SMALL * subject.inputs(layout.shape)
    y = subject.run(x, training=True) - layout.beside(offset)
    centred, variance = spread(x, layout, pool)
    root = layout.beside(gain) * centred / y
    return _told(subject, float((root.square() - variance).flatten().median()))


def _told(subject: Subject, found: float) -> float:
    """The eps that a module says it has, or that norms usually have, if it is near what was found.

    Args:
        subject: the module.
        found: what was found.
    """
    told = [value for value in vars(subject.module).values() if isinstance(value, float)]
    likely = (*told, *(10.0**-power for power in range(3, 13)))
    near = [each for each in likely if math.isclose(each, found, rel_tol=1e-3)]
    return near[0] if near else max(found, 0.0)


def _misfit(subject: Subject, found: Behaviour) -> str:
    """What is wrong with an explanation; empty if its formula gives the module's outputs."""
    for layout in (found.layout, found.layout.larger()):
        for size in (1.0, max(math.sqrt(found.eps), SMALL)):
            x = size * (subject.inputs(layout.shape) + 0.3)
            for training in (True, False):
                expected = _rebuilt(subject, found, layout, x, training=training)
                if not _alike(subject.run(x, training=training), expected):
                    return "its outputs are near those of a norm, and not equal to them"
    return ""


def _rebuilt(
    subject: Subject, found: Behaviour, layout: Layout, x: Tensor, *, training: bool
) -> Tensor:
    """What the module's output should be."""
    tensors = {
        name: {**subject.parameters, **subject.buffers}[held] for name, held in found.names.items()
    }
    one = x.new_ones(found.num_features)
    gain, offset = found.counts.applied(
        tensors.get("weight", one), tensors.get("bias", torch.zeros_like(one))
    )
    pools = found.rule.train if training else found.rule.eval
    if pools.over != "running":
        shape = standardized(x, layout, found.rule.train, found.eps)
    else:
        root = (tensors["running_var"] + found.eps).sqrt()
        shape = (x - layout.beside(tensors["running_mean"])) / layout.beside(root)
    return layout.beside(gain) * shape + layout.beside(offset)


def _alike(y: Tensor, expected: Tensor, scale: float | None = None) -> bool:
    largest = float(expected.abs().max()) if scale is None else scale
    return float((y - expected).abs().max()) <= TOLERANCE * largest


def _same(tensors: Mapping[str, Tensor], values: Tensor) -> str:
    """The name of the tensor that has these values, or nothing."""
    return next((name for name, tensor in tensors.items() if _alike(values, tensor)), "")
