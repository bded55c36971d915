"""What every norm shares that takes extra inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.errors import InputError
from normswap.norms.inputs.call import Call, entered, for_norm
from normswap.norms.inputs.kinds import ExtraInput
from normswap.norms.plain import PlainNorm

__all__ = ["InputNorm"]


class InputNorm(PlainNorm):
    """A norm that takes extra inputs, or what makes one of another norm, mixed in before it.

    In a converted model they come from the model's call. A norm that is used alone takes them as
    keywords itself. A class says what it takes (`extra_inputs`) and which parameters start at zero
    (`deltas`), and reads a value where it normalizes, by `called_with`, `shares_of` or `resized`.

    >>> class LevelNorm(normswap.InputNorm):
    ...     extra_inputs = (normswap.ExtraInput("level", (normswap.Form(("N",), "numbers"),)),)
    ...     deltas = ("slope",)
    ...
    ...     def __init__(self, num_features: int) -> None:
    ...         super().__init__(num_features)
    ...         self.slope = nn.Parameter(torch.zeros(num_features))
    ...
    ...     def pools(self, *, tracks: bool) -> Rule:
    ...         return Rule.always(per_group(self.num_features))
    ...
    ...     def normalize(self, x: Tensor) -> Tensor:
    ...         level = self.called_with("level", x)[1]
    ...         gain = self.weight * (1 + level[:, None] * self.slope)
    ...         return F.group_norm(x, 1, eps=self.eps) * gain[:, :, None, None]
    """

    @property
    @abstractmethod
    def extra_inputs(self) -> tuple[ExtraInput, ...]:
        """What it takes."""

    @property
    @abstractmethod
    def deltas(self) -> tuple[str, ...]:
        """Names of the parameters that are zero as long as nothing has learned to follow them."""

    def obstacle(self) -> str:
        """No other norm follows the inputs as it has learned to."""
        told = (self.get_parameter(name) for name in self.deltas)
        if any(not delta.is_meta and bool(delta.any()) for delta in told):
            names = ", ".join(f"{one.name}=" for one in self.extra_inputs)
            return f"its affine has learned to follow {names} (normswap.revert gives back the norm)"
        return ""

    def forward(self, input: Tensor, **given: Any) -> Tensor:
        """Normalize the input, of any shape with ``num_features`` channels at ``channel_dim``.

        Args:
            input: the input.
            **given: extra inputs; those that are not given here are the model's call's.

        Raises:
            InputError: an extra input is missing, or is not what is expected.
        """
        if not given:
            return super().forward(input)
        names = [one.name for one in self.extra_inputs]
        for name in given:
            if name not in names:
                raise TypeError(f"{type(self).__name__} takes {', '.join(names)}, and no {name}=")
        output: Tensor = entered(super().forward, self.extra_inputs, {}, (input,), given)
        return output

    def called_with(self, name: str, x: Tensor) -> tuple[Call, Any]:
        """The call that it is reached in, and the value there of one of its inputs.

        Args:
            name: of the input.
            x: what the norm is given, (N, C, ...).

        Raises:
            InputError: it is missing without a default, or of another number of samples.
        """
        one = next(one for one in self.extra_inputs if one.name == name)
        here = self.site_path or type(self).__name__
        call = for_norm(here, one, x.device)
        value = call.values[name]
        if isinstance(value, Tensor) and value.ndim and value.shape[0] != x.shape[0]:
            raise InputError(
                f"{here} is given {x.shape[0]} samples, and {name}= is of {value.shape[0]}: inside "
                "the model its samples are cut or joined, and which is whose is not known"
            )
        return call, value

    def shares_of(self, name: str, count: int, x: Tensor) -> Tensor:
        """How much of each of several each sample has, (N, count), of the dtype of x.

        Args:
            name: of an input that is one index for all, an index for each sample, or weights.
            count: how many there are to choose from.
            x: (N, C, ...).
        """
        call, value = self.called_with(name, x)
        samples = x.shape[0]

        def make() -> Tensor:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(x.dtype)
            if isinstance(value, Tensor) and value.ndim:
                return F.one_hot(value.long(), count).to(x.dtype)
            shares = x.new_zeros(samples, count)
            shares[:, int(value)] = 1
            return shares

        return call.once(("shares", name, count, samples, x.dtype, x.device), make)

    def resized(
        self,
        name: str,
        x: Tensor,
        resize: Callable[[Tensor, tuple[int, ...]], Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """A spatial input in the size of a norm's map, made once for each size in a call.

        Args:
            name: of the input.
            x: (N, C, ...), the map.
            resize: makes the input of a size of it.
            dtype: what it is to be.

        Raises:
            InputError: the map has not as many dimensions as the input.
        """
        call, value = self.called_with(name, x)
        size = tuple(x.shape[2:])
        if not size:
            raise InputError(f"{self.site_path}: its input has no positions for {name}=")
        key = (resize, name, size, dtype)
        return call.once(key, lambda: resize(value, size).to(dtype))
