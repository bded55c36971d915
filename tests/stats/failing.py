"""Data, and loaders and models that fail on it at a chosen moment."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from tests.stats.models import cut, images, net

SIZES = [4, 3, 5, 2]


def data() -> list[Tensor]:
    """Four batches."""
    return cut(images(sum(SIZES)), SIZES)


def failing(error: type[BaseException], after: int = 3) -> Iterator[Tensor]:
    """Some of the batches, and an error."""
    yield from data()[:after]
    raise error("on purpose")


class Counting(nn.Module):
    """Counts its calls, and raises at one of them."""

    def __init__(
        self, raise_at: int | None = None, error: type[BaseException] = LookupError
    ) -> None:
        super().__init__()
        self.calls, self.raise_at, self.error = 0, raise_at, error

    def forward(self, x: Tensor) -> Tensor:
        """Return what is given."""
        self.calls += 1
        if self.calls == self.raise_at:
            raise self.error("on purpose")
        return x


def counting(raise_at: int | None = None) -> nn.Sequential:
    """A net that counts its calls after the first norm, and raises at one of them."""
    return net().insert(2, Counting(raise_at))
