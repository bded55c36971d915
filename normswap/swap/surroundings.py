"""What only a site's surroundings tell of its state, asked for where a target needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normswap.graph.calls import own_class
from normswap.graph.following import Following
from normswap.graph.modules import read_site
from normswap.graph.readers import read_attributes
from normswap.graph.site import NormSite
from normswap.graph.streams import Streams
from normswap.norms.beside import Activation, Neighbour, Previous, Stream
from normswap.norms.functional import FunctionalNorm, owner_of
from normswap.norms.renamed import whole
from normswap.norms.state import NormState
from normswap.swap.handover import model_place
from normswap.swap.journal import record_of

__all__ = ["Surroundings"]


def _momentum(site: NormSite) -> float | None:
    """The norm's momentum, or where it knows none, that of the first norm in its place."""
    record = record_of(site.module)
    if record is None or "momentum" in site.state.settings:
        return site.state.momentum
    return read_site(record.original, site.path).state.momentum


def _memory(tensor: Tensor) -> object:
    """What two tensors have in common if one is the other, or was made of the other's data."""
    try:
        return tensor.untyped_storage()._cdata, tensor.storage_offset()
    except (NotImplementedError, RuntimeError):  # a sparse one, or one that others stand for
        return id(tensor)


def _misfit(site: NormSite, module: Any, *, before: bool) -> str:
    """Why a layer's channels are not the norm's; empty if they are."""
    linear = isinstance(module, nn.Linear)
    side = "out" if before else "in"
    size = getattr(module, f"{side}_features" if linear else f"{side}_channels")
    if size != site.num_features:
        return f"its {size} channels are not the norm's {site.num_features}"
    if not linear or site.channel_dim != 1:
        return ""
    if site.input_shape is None:
        return (
            "a Linear's features are last, and the norm's channels may not be: give example_inputs"
        )
    return (
        "" if len(site.input_shape) == 2 else "its features are not where the norm's channels are"
    )


class Surroundings:
    """The model around its sites.

    Args:
        model: the model.
        example_inputs: arguments of one run to record; ``None`` to trace without.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model = model
        self._inputs = example_inputs
        self._place = model_place(model)

    def inform(self, site: NormSite, needs: Set[str]) -> NormState:
        """The site's state with what a target needs to be told of it."""
        state = replace(site.state, like=self._place, momentum=_momentum(site))
        if "dim" in needs and state.dim is None:
            dim = self._dimension(site)
            # A call in a forward is out of reach for example inputs. Tokens are flattened anyway.
            called = (site.owner or owner_of(site.module)) is not None
            flattens = dim is None and called and state.channel_dim == 1
            state = replace(state, dim=1 if flattens else dim, flattens=flattens)
        if "neighbours" in needs:
            before, after = self._producer(site), self._consumer(site)
            state = replace(state, producer=before, consumer=after)
        if "previous" in needs:
            state = replace(state, producer=self._producer(site), previous=self._previous(site))
        if "activation" in needs:
            state = replace(state, activation=self._activation(site))
        if "stream" in needs:
            state = replace(state, stream=self._stream(site))
        return state

    def shares_affine(self, site: NormSite) -> bool:
        """Whether another layer has the same weight or bias, which no start may rewrite for it."""
        if isinstance(site.module, FunctionalNorm) and site.module.shared:
            return True
        state = site.state
        held = (tensor for tensor in (state.weight, state.bias) if tensor is not None)
        return any(self._owners[_memory(whole(tensor))] > 1 for tensor in held)

    def reads(self, site: NormSite) -> dict[str, str]:
        """What forwards read of the norm itself, beside what it makes: by whom, by name."""
        found: dict[str, str] = {}
        for path in site.names if site.origin == "module" else ():
            parent, _, name = path.rpartition(".")
            if path:
                owner = self._model.get_submodule(parent)
                reader = own_class(owner).__name__
                found |= dict.fromkeys(sorted(read_attributes(owner, name)), reader)
        return found

    def _dimension(self, site: NormSite) -> int | None:
        """How many dimensions follow the channels.

        The first original's class tells, or example inputs, or the convolutions before.
        """
        record = record_of(site.module)
        known = read_site(record.original, site.path).state.dim if record else None
        if known is not None:
            return known
        if site.input_shape is not None:
            return max(len(site.input_shape) - 2, 1)
        before = site.around.producers if site.around and site.channel_dim == 1 else ()
        layers = [self._model.get_submodule(path) for path in before]
        sizes = {len(layer.kernel_size) for layer in layers if isinstance(layer, _ConvNd)}
        return sizes.pop() if len(sizes) == 1 else None

    def _producer(self, site: NormSite) -> Neighbour:
        around = site.around
        if around is None:
            return Neighbour(problem="no graph shows what feeds it")
        if around.producer is None:
            return Neighbour(problem="no convolution or linear feeds it directly")
        module = self._model.get_submodule(around.producer)
        problem = ""
        if module._forward_hooks or site.module._forward_pre_hooks:
            problem = f"a hook stands between it and {around.producer}"
        elif not around.feeds_alone:
            problem = f"something else reads the output of {around.producer}"
        return self._neighbour(site, around.producer, problem, before=True)

    def _consumer(self, site: NormSite) -> Neighbour:
        around = site.around
        if around is None:
            return Neighbour(problem="no graph shows what reads it")
        if around.consumer is None:
            return Neighbour(problem="no convolution or linear alone reads it directly")
        module = self._model.get_submodule(around.consumer)
        hooked = module._forward_pre_hooks or site.module._forward_hooks
        problem = f"a hook stands between it and {around.consumer}" if hooked else ""
        return self._neighbour(site, around.consumer, problem, before=False)

    def _previous(self, site: NormSite) -> Previous:
        around = site.around
        if around is None:
            return Previous(problem="no graph shows what stands before it")
        if around.previous is None:
            return Previous(
                problem="no norm stands before the layer that feeds it, with an activation at most "
                "between them"
            )
        norm = self._model.get_submodule(around.previous)
        tail = read_site(norm, around.previous).state.behind(norm).values()
        passing = (nn.Identity, nn.Dropout)
        functions = [each for each in (*tail, around.between) if each is not None]
        functions = [each for each in functions if not isinstance(each, passing)]
        return Previous(norm, tuple(functions), "")

    def _activation(self, site: NormSite) -> Activation:
        for name, fused in reversed(site.state.behind(site.module).items()):
            if not isinstance(fused, (nn.Identity, nn.Dropout)):
                path = f"{site.path}.{name}".lstrip(".")
                return Activation(path, fused, fused=name, problem="")
        if site.owner is not None or owner_of(site.module) is not None:
            return Activation(problem="a call in a forward has no neighbours that are known")
        if site.module._forward_hooks:
            return Activation(problem="a hook stands between it and what reads it")
        return self._following.of(site.path)

    def _stream(self, site: NormSite) -> Stream:
        if site.origin != "module" or owner_of(site.module) is not None:
            return Stream(problem="it is called in a forward, where no graph shows what it reads")
        stream = self._streams.of(site.path)
        shared = [
            each
            for each in stream.writers
            if (parameter := each.module._parameters[each.name]) is not None
            and self._owners[_memory(parameter)] > 1
        ]
        if stream.problem or not shared:
            return stream
        kind = type(shared[0].module).__name__
        return Stream(problem=f"the {shared[0].name} of a {kind} is shared with another layer")

    @cached_property
    def _streams(self) -> Streams:
        return Streams(self._model, self._inputs)

    @cached_property
    def _following(self) -> Following:
        return Following(self._model, self._inputs)

    def _neighbour(self, site: NormSite, path: str, problem: str, *, before: bool) -> Neighbour:
        module: Any = self._model.get_submodule(path)
        calls = site.neighbourhood_calls(module)
        problem = problem or _misfit(site, module, before=before)
        if site.around is not None and site.around.calls != 1:
            problem = f"the norm is called {site.around.calls} times"
        elif calls != 1:
            problem = f"{path} is called {calls} times"
        elif site.read_elsewhere(path):
            problem = f"a forward reads the weight of {path} by itself"
        elif any(self._owners[_memory(p)] > 1 for p in module.parameters(recurse=False)):
            problem = f"the weight of {path} is shared with another layer"
        return Neighbour(path, module, problem)

    @cached_property
    def _owners(self) -> Counter[object]:
        """How many modules hold each parameter, or another in its memory."""
        return Counter(
            _memory(parameter)
            for module in self._model.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )
