"""Finding norms by walking: every module, once, under all of its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from normswap.errors import UnsupportedModel
from normswap.graph.behaviour import Behaviour
from normswap.graph.calls import functional_norms, holders, own_class
from normswap.graph.functional import forward_of
from normswap.graph.handwritten import handwritten_norms, may_have_handwritten
from normswap.graph.known import is_norm, looks_like_a_norm, read_by_behaviour, recognised
from normswap.graph.neighbours import Neighbourhood
from normswap.graph.site import NormSite, Sites
from normswap.norms.functional import referred, refresh
from normswap.norms.pool import NOTHING, Rule
from normswap.norms.registry import reader
from normswap.norms.state import NormState

__all__ = ["find", "quantized", "read_site", "require_module", "uninitialised"]


def find(model: nn.Module, example_inputs: Any = None) -> Sites:
    """Find every normalization of a model, the model itself included.

    Modules are found by walking. A module of an unknown class that has no children, and whose
    code takes statistics, is tried out on a copy, and is a norm if a formula can be told that
    gives its outputs. What is inside a norm (a fused activation, an inner norm) is the norm's own
    and not listed. What feeds a norm, what follows it and how often it is called is read from a
    torch.fx trace of a copy, made at the first question. The model is not touched.

    Args:
        model: any module.
        example_inputs: arguments for one forward in eval mode: a tensor, a tuple or list of
            positional arguments, or a mapping of keyword arguments. A run of a copy is recorded,
            on the meta device if it can be, and takes the place of the trace: it sees through any
            control flow of Python, and tells the input shapes.

    Returns:
        The sites in the order of the model's modules; ``print()`` shows a table.
    """
    require_module(model)
    unrecognised: dict[str, str] = {}
    names: dict[int, list[str]] = {}
    norms: dict[int, nn.Module] = {}
    inside: set[int] = set()
    parts: dict[int, str] = {}
    callers: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if quantized(module):
            parts.update((id(child), type(module).__name__) for child in module.modules())
        if id(module) in inside:
            continue
        if reader(type(module)) is None and forward_of(own_class(module)) is not None:
            callers.setdefault(id(module), (module, []))[1].append(path)
        elif is_norm(module):
            if id(module) not in norms:
                inside.update(map(id, module.modules()))
                inside.discard(id(module))
            norms[id(module)] = module
            names.setdefault(id(module), []).append(path)
        else:
            if may_have_handwritten(module):
                callers.setdefault(id(module), (module, []))[1].append(path)
            problem = looks_like_a_norm(module)
            if problem:
                unrecognised[path] = f"{type(module).__name__}: {problem}"
    neighbourhood = Neighbourhood(model, example_inputs)
    sites = [
        read_site(module, names[key][0], tuple(names[key][1:]), neighbourhood)
        for key, module in norms.items()
    ]
    sites = [_fused(site, parts) for site in sites]
    read = {id(holder): owner for owner, _ in callers.values() for holder in holders(owner)}
    sites = [_read_by_a_call(site, read) for site in sites]
    sites += [site for owner, paths in callers.values() for site in _called(owner, paths)]
    if neighbourhood.recording is not None:
        shapes = neighbourhood.recording.shapes
        sites = [
            site
            if site.owner is not None
            else replace(site, input_shapes=tuple(shapes.get(site.path, ())))
            for site in sites
        ]
    return Sites(sites, neighbourhood, unrecognised)


def read_site(
    module: nn.Module,
    path: str,
    aliases: tuple[str, ...] = (),
    neighbourhood: Neighbourhood | None = None,
) -> NormSite:
    """Read one norm module into a site.

    Raises:
        TypeError: the module is not of a known class.
    """
    known, told = reader(type(module)), recognised(module)
    unready = uninitialised(module) or quantized(module)
    refresh(module)
    if isinstance(told, Behaviour):
        obstacle = _hooked(module)
        state = _unread(module) if unready else read_by_behaviour(module, told)
    elif known is not None:
        read, known_class = known
        obstacle = _obstacle(module, known_class)
        state = _unread(module) if unready else read(module)
    else:
        raise TypeError(f"{type(module).__name__} is not a known norm")
    if not obstacle and not state.norm and state.obstacle:
        obstacle = f"{state.obstacle}; leave it out by skip="
    return NormSite(
        path=path,
        kind=state.kind,
        origin="module",
        module=module,
        state=state,
        aliases=aliases,
        obstacle=obstacle,
        unready=unready,
        recognised=told.words if isinstance(told, Behaviour) else "",
        _neighbourhood=neighbourhood,
    )


def _called(owner: nn.Module, paths: list[str]) -> Iterator[NormSite]:
    """The functional norms of a module, under the names that norms in their places would have."""
    calls = ((stub, problem, "") for stub, problem in functional_norms(owner))
    regions = ((stub, "", words) for stub, words in handwritten_norms(owner))
    for stub, problem, words in chain(calls, regions):
        yield NormSite(
            path=paths[0],
            kind=stub.state.kind,
            origin=stub.origin,
            module=stub,
            state=stub.state,
            owner=owner,
            aliases=(*paths[1:], *(f"{path}.{stub.name}".lstrip(".") for path in paths)),
            obstacle=f"{problem}; leave it out by skip=" if problem else "",
            recognised=words,
        )


def _read_by_a_call(site: NormSite, read: dict[int, nn.Module]) -> NormSite:
    """The site, with an obstacle if another module hands its tensors to a norm function."""
    owner = read.get(id(site.module))
    if owner is None or site.obstacle:
        return site
    obstacle = f"the forward of {type(owner).__name__} hands its tensors to a norm function"
    return replace(site, obstacle=f"{obstacle}; leave it out by skip=")


def _fused(site: NormSite, holders: dict[int, str]) -> NormSite:
    """The site, unready if it is a part of a module for quantization, which reads it."""
    holder = holders.get(id(site.module))
    if holder is None or site.unready:
        return site
    obstacle = f"it is part of a {holder}, which reads it; convert the model before quantizing it"
    return replace(site, obstacle=obstacle, unready=True)


def require_module(model: object) -> None:
    """Raise `UnsupportedModel` for what is no model at all."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself"
        )


def _obstacle(module: nn.Module, known_class: type[nn.Module]) -> str:
    """Why nothing can be said of what the module computes, and the way out, if so."""
    if uninitialised(module):
        return "it is lazy and not initialised yet; run one batch through the model first"
    if quantized(module):
        return "it is quantized; convert the model before quantizing it"
    if "forward" in vars(module):
        return "its forward was replaced on the instance; undo that first"
    plain: Any = parametrize.type_before_parametrizations(module)
    if plain.forward is not known_class.forward:
        return (
            f"it overrides the forward of {known_class.__name__}, so what it computes is not "
            "known; leave it out by skip="
        )
    return _hooked(module)


def _hooked(module: nn.Module) -> str:
    """Whether its tensors are made anew at every forward, and the way out, if so."""
    for name in ("weight", "bias"):
        if name in vars(module) and name not in referred(module):
            return f"its {name} is recomputed by a hook; remove that hook (weight norm?) first"
    return ""


def uninitialised(module: nn.Module) -> bool:
    """Whether a lazy module has not seen its first batch."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def quantized(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantized or quantization-aware classes."""
    where = type(module).__module__
    return where.startswith("torch.ao.nn") or ".quantized" in where


def _unread(module: nn.Module) -> NormState:
    """What can be said of a norm that has no weights to speak of yet, or no longer."""
    kind = "instance_norm" if "Instance" in type(module).__name__ else "batch_norm"
    return NormState(norm="", kind=kind, num_features=0, rule=Rule.always(NOTHING))
