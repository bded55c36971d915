"""What an extra input may be, and the error where it is something else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from normswap.errors import InputError

__all__ = ["ExtraInput", "Form", "is_looked_at"]


#: What kinds of numbers are called, and as which dtype they are shown.
_KINDS = {
    "integers": torch.long,
    "numbers": torch.float32,
    "zeros and ones": torch.bool,
}


def is_looked_at() -> bool:
    """Whether something looks at the operations one by one, so that values are not known."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


@dataclass(frozen=True)
class Form:
    """One form that an input may have.

    Args:
        shape: its sizes; ``"N"`` is the number of samples, ``"*"`` any one or more positions.
        kind: ``"integers"``, ``"numbers"`` of floating point, or ``"zeros and ones"`` of any
            dtype.
        below: what integers are smaller than; they are never negative.
    """

    shape: tuple[int | str, ...]
    kind: Literal["integers", "numbers", "zeros and ones"]
    below: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it has, or is shown as."""
        return _KINDS[self.kind]

    def fits(self, value: object) -> bool:
        """Whether a value has the sizes and the dtype, whatever the number of samples."""
        if not isinstance(value, Tensor):
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and not self.shape and self.kind == "integers"
        return self._is_of_kind(value.dtype) and self._has_shape(tuple(value.shape))

    def _is_of_kind(self, dtype: torch.dtype) -> bool:
        if self.kind == "zeros and ones":
            return not dtype.is_complex
        floats = dtype.is_floating_point
        return floats if self.kind == "numbers" else not (floats or dtype == torch.bool)

    def _has_shape(self, shape: tuple[int, ...]) -> bool:
        fixed = [size for size in self.shape if size != "*"]
        open_ended = len(fixed) < len(self.shape)
        if len(shape) < len(self.shape) or (len(shape) > len(fixed) and not open_ended):
            return False
        return all(want in ("N", have) for want, have in zip(fixed, shape, strict=False))

    def misfit(self, value: Any) -> str:
        """Which values do not fit; empty if all do, or where they are not known."""
        limited = self.below is not None or self.kind == "zeros and ones"
        if not limited or is_looked_at():
            return ""
        if not isinstance(value, Tensor):
            fits = 0 <= value < self.below if self.below is not None else True
            return "" if fits else f"got {value}"
        if value.is_meta or value.numel() == 0:
            return ""
        if self.kind == "zeros and ones":
            fits = value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())
            return "" if fits else "got other values"
        low, high = (int(end) for end in value.aminmax())
        fits = low >= 0 and (self.below is None or high < self.below)
        return "" if fits else f"got {low} to {high}"

    def __str__(self) -> str:
        sizes = ", ".join("..." if size == "*" else str(size) for size in self.shape)
        span = "" if self.below is None else f" from 0 to {self.below - 1}"
        if not self.shape:
            return f"one of the {self.kind}{span}"
        return f"{self.kind}{span} of shape ({sizes}{',' if len(self.shape) == 1 else ''})"


@dataclass(frozen=True)
class ExtraInput:
    """An extra input of a norm, which a converted model takes as a keyword.

    Args:
        name: the keyword.
        forms: what it may be; N is the number of samples.
        default: what it is when it is not given.
        required: whether it has to be given.
    """

    name: str
    forms: tuple[Form, ...]
    default: Any = None
    required: bool = True

    @property
    def shape(self) -> tuple[int | str, ...]:
        """The shape of its first form; ``"N"`` is the number of samples, ``"*"`` positions."""
        return self.forms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first form."""
        return self.forms[0].dtype

    def refuse_misfit(self, value: Any, samples: Collection[int]) -> None:
        """Raise unless a value is what is expected.

        Args:
            value: what was given.
            samples: how many samples the batch may have, as far as its tensors tell.

        Raises:
            InputError: naming the input, what was expected, and what was given.
        """
        form = next((form for form in self.forms if form.fits(value)), None)
        if form is None:
            raise InputError(f"{self}, and got {_described(value)}")
        if form.shape and samples and value.shape[0] not in samples:
            sizes = " or ".join(map(str, sorted(samples)))
            raise InputError(f"{self}; N is {sizes} here, and got {_described(value)}")
        problem = form.misfit(value)
        if problem:
            raise InputError(f"{self}, and {problem}")

    def refuse_missing(self) -> None:
        """Raise if there is no default.

        Raises:
            InputError: naming the input and what was expected.
        """
        if self.required:
            raise InputError(f"{self}, and was not given; call model(..., {self.name}=...)")

    def __str__(self) -> str:
        return f"{self.name}= should be {', or '.join(map(str, self.forms))}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
