"""The original model, run beside the converted one, norm by norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normswap.errors import StatisticsError
from normswap.norms.base import Norm
from normswap.norms.registry import reader
from normswap.stats.calibration.ambient import kept_ambient
from normswap.stats.strand import Strand, stop

__all__ = ["Companion", "Tell", "telling"]

#: ``tell(path, output)``: what a norm has computed, before its fused activation.
Tell = Callable[[str, Tensor], None]


@contextmanager
def telling(norms: Mapping[str, nn.Module], tell: Tell) -> Iterator[None]:
    """Within the block every call of these norms is told, with what it has computed.

    A fused dropout or activation comes after that; it may overwrite the output, in place.
    """
    handles: list[Any] = []
    try:
        for path, norm in norms.items():
            handles += _listen(path, norm, tell)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listen(path: str, norm: nn.Module, tell: Tell) -> list[Any]:
    tail = _tail_of(norm)
    if not tail:
        return [norm.register_forward_hook(lambda module, args, y: tell(path, y))]
    first: Any = getattr(norm, tail[0])
    return [first.register_forward_pre_hook(lambda module, args: tell(path, args[0]))]


def _tail_of(norm: nn.Module) -> tuple[str, ...]:
    if isinstance(norm, Norm):
        return norm.tail
    found = reader(type(norm))
    if found is None:
        return ()
    state = found[0](norm)
    return tuple(name for name in state.tail if name not in state.within)


class Companion:
    """One forward of the original model, run as far as the converted model has got.

    Args:
        run: runs the forward, whose norms must tell `arrive`.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._strand = Strand(run)

    @staticmethod
    def arrive(path: str, output: Tensor) -> None:
        """Stop the companion at a norm: what its norms are to tell."""
        with kept_ambient():
            stop((path, output))

    def output_at(self, path: str) -> Tensor:
        """What the original norm computes at the next call, which is to be this norm's.

        Raises:
            StatisticsError: the original model calls another one first.
        """
        told = None if self._strand.ended else self._advance()
        if self._strand.ended or told is None or told[0] != path:
            there = "ends" if self._strand.ended or told is None else f"calls {told[0]}"
            raise StatisticsError(
                f"{path}: the converted model calls it where the original model {there}, so the "
                "two cannot be compared norm by norm; calibrate where= both take the same way"
            )
        output: Tensor = told[1]
        return output

    def finish(self) -> Any:
        """Run to the end; return what the original model returns."""
        result = None
        while not self._strand.ended:
            result = self._advance()
        return result

    def give_up(self) -> None:
        """End it where it is."""
        with kept_ambient():
            self._strand.give_up()

    def _advance(self) -> Any:
        with kept_ambient():
            return self._strand.advance()
