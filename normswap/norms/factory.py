"""Targets that a user's class or function makes, one module for a number of channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from normswap.errors import CannotConvert, OptionError
from normswap.norms.entry import ANY_SOURCE
from normswap.norms.fidelity import Fidelity
from normswap.norms.registry import lookup, reader
from normswap.norms.spec import NormSpec, Target
from normswap.norms.start import Carry, Start
from normswap.norms.state import AFFINE_TENSORS, NormState

__all__ = ["FactorySpec"]


@dataclass(frozen=True)
class FactorySpec(Target):
    """A norm that a class or a function of the number of channels makes.

    What it makes of a registered class becomes the registered norm with the same settings, so
    that nothing is lost. Of another class the module itself is used, and takes weight and bias
    where it has them per channel.

    Args:
        factory: ``factory(num_features) -> nn.Module``.
    """

    factory: Callable[[int], nn.Module]

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is called in plans and reports."""
        factory = self.factory.func if isinstance(self.factory, partial) else self.factory
        return getattr(factory, "__name__", type(factory).__name__)

    @property
    def sources(self) -> frozenset[str]:
        """Any family: who writes a factory knows where it belongs, and says so by ``where``."""
        return ANY_SOURCE

    @property
    def needs(self) -> frozenset[str]:
        """The dimension, which some registered norms need."""
        return frozenset({"dim"})

    def settled(self, state: NormState) -> Target:
        """The registered norm that it makes, if it makes one."""
        made = self.make(state.num_features)
        found = reader(type(made))
        if found is None or found[1] is not type(made):
            return self
        read = found[0](made)
        if read.channel_dim == -1 and state.channel_dim == 1:
            raise CannotConvert(
                f"a {type(made).__name__} normalizes the last dimension, and its channels are not "
                "there",
                'use to="ln2d" or "rms2d" for each position, or to="ln" or "rms" for each sample',
            )
        return NormSpec(read.norm, _asked_for(made, read))

    def start(self, state: NormState, *, carry: Carry = "auto") -> Start:
        """Start with the module itself, of a class that is not registered."""
        made = self.make(state.num_features)
        if state.tail or state.channel_dim != 1:
            raise CannotConvert(
                f"a {type(made).__name__} is not known to take its layout or its activation",
                "register the class, or leave this layer out by skip=",
            )
        names = () if carry == "fresh" else _shared_affine(made, state)
        return Start(
            fidelity=Fidelity.AFFINE if names else Fidelity.FRESH,
            shell=partial(self.make, state.num_features),
            affine=names,
            running=(),
            values=dict,
        )

    def describes(self, state: NormState) -> bool:
        """No source is known to be what an unregistered class makes."""
        return False

    def make(self, num_features: int) -> nn.Module:
        """Make a module.

        Raises:
            OptionError: the factory failed, or gave something else.
        """
        try:
            made = self.factory(num_features)
        except Exception as error:
            raise OptionError(
                f"{self.name}({num_features}) failed: {error}; give a class or a function that "
                "takes the number of channels alone"
            ) from error
        if not isinstance(made, nn.Module):
            raise OptionError(
                f"{self.name}({num_features}) gave {type(made).__name__}, and should give a module"
            )
        return made

    def __str__(self) -> str:
        return self.name


def _asked_for(made: nn.Module, state: NormState) -> dict[str, object]:
    """The options by which a registered norm becomes as a module is, where it is not as usual.

    What is at its class's default was not asked for: there the source's own setting stays.
    """
    usual = {
        name: parameter.default
        for cls in reversed(type(made).__mro__)
        if "__init__" in vars(cls)
        for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items()
    } | {"affine": True}
    options = {
        option.name: state.settings[option.name]
        for option in lookup(state.norm).options
        if state.settings.get(option.name, usual.get(option.name)) != usual.get(option.name)
    }
    if "num_groups" in options:
        options.pop("channels_per_group", None)
    return options


def _shared_affine(made: nn.Module, state: NormState) -> tuple[str, ...]:
    """Which of weight and bias the module has per channel, as the source does."""

    def shared(name: str) -> bool:
        own, theirs = getattr(made, name, None), getattr(state, name)
        return isinstance(own, nn.Parameter) and theirs is not None and own.shape == theirs.shape

    return tuple(name for name in AFFINE_TENSORS if shared(name))
