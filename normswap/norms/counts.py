"""How weight and bias enter what a norm computes, where it is not as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PLAIN", "Counts", "Factor", "factor"]

#: A number, or one for each channel.
Factor = float | tuple[float, ...]


@dataclass(frozen=True)
class Counts:
    """Gain ``weight · of_weight + base`` and offset ``bias · of_bias + added``.

    Args:
        of_weight: what weight is multiplied by.
        base: what is added to the gain, as where a weight that starts at 0 stands for a gain of 1.
        of_bias: what bias is multiplied by.
        added: what is added to the offset.
    """

    of_weight: Factor = 1.0
    of_bias: Factor = 1.0
    added: Factor = 0.0
    base: Factor = 0.0

    def applied(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The gain and the offset that a weight and a bias make, (C,) each."""
        offset = bias * _beside(self.of_bias, bias) + _beside(self.added, bias)
        gain = weight * _beside(self.of_weight, weight) + _beside(self.base, weight)
        return gain, offset

    def undone(self, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias that make a gain and an offset, (C,) each."""
        bias = (offset - _beside(self.added, offset)) / _beside(self.of_bias, offset)
        weight = (gain - _beside(self.base, gain)) / _beside(self.of_weight, gain)
        return weight, bias


#: Of most norms: weight and bias as they are.
PLAIN = Counts()


def factor(values: Tensor) -> Factor:
    """Numbers of the channels (C,), as one where they are all the same."""
    numbers = values.detach().double().cpu().tolist()
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def _beside(number: Factor, values: Tensor) -> float | Tensor:
    """A factor that values (C,) can be multiplied by."""
    return number if isinstance(number, float) else values.new_tensor(number)
