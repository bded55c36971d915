"""What every norm of normswap shares: where its channels are, and what runs right after it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from normswap.errors import DegeneratePooling
from normswap.norms.state import NormState

__all__ = ["Norm", "channels_first", "channels_restored", "place"]


def channels_first(x: Tensor, channel_dim: int) -> Tensor:
    """View an input with its channels elsewhere as (N, C, L), or (N, C) where it has no more.

    No copy is made of a contiguous channels-last input.
    """
    moved = x.movedim(channel_dim, 1)
    return moved if moved.ndim < 3 else moved.flatten(2)


def channels_restored(y: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """Undo `channels_first` for an output of the same size, as a view."""
    return y.reshape(like.movedim(channel_dim, 1).shape).movedim(1, channel_dim)


class Norm(nn.Module):
    """Mixed in before a torch norm: its channels may be anywhere, and a tail may follow.

    Attributes:
        channel_dim: the input's channel dimension, 1 or -1.
        tail: names of the children that run after the norm, in order: a fused dropout or
            activation that the layer it replaces had.
        path: where the layer stands in the model that it was put into, for error messages.
        own: names of attributes, tensors and children that mean something to this norm only, and
            do not move on to a norm that replaces it.
    """

    channel_dim: int = 1
    tail: tuple[str, ...] = ()
    path: str = ""
    own: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, of any shape with ``num_features`` channels at ``channel_dim``."""
        if self.channel_dim == 1:
            y = self.normalize(x)
        else:
            y = self.normalize(channels_first(x, self.channel_dim))
            y = channels_restored(y, x, self.channel_dim)
        for name in self.tail:
            y = getattr(self, name)(y)
        return y

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x with its channels at dimension 1."""
        return cast(Tensor, super().forward(x))

    def refuse_single_value(self, values: int) -> None:
        """Raise if a statistic would be pooled over one value, which erases the input."""
        if values == 1:
            raise DegeneratePooling(
                f"{self.path or 'this layer'} ({type(self).__name__}): each statistic would be "
                "pooled over a single value, so every output would be the bias; use a larger "
                "batch or map, or fewer groups, or leave this layer out by skip="
            )


def place(module: Norm, state: NormState) -> Norm:
    """Give a new norm the layout and the tail of the layer that it replaces."""
    if state.channel_dim != 1:
        module.channel_dim = state.channel_dim
    if state.tail:
        module.tail = state.tail
    return module
