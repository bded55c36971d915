"""What every norm of normswap shares: where its channels are, and what runs right after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from normswap.errors import DegeneratePooling
from normswap.norms.state import NormState

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Norm", "place", "rearranged", "restored"]


def rearranged(x: Tensor, channel_dim: int, native_dim: int, *, flat: bool = True) -> Tensor:
    """View an input with its channels at ``channel_dim`` so that a norm finds them.

    No copy is made of a contiguous input.

    Args:
        x: the input.
        channel_dim: where its channels are, 1 or -1.
        native_dim: where the norm wants them. 1 gives (N, C, L), or (N, C) where there is no
            more: what follows the channels is one dimension. -1 gives (N, ..., C).
        flat: whether positions become one dimension; else 1 gives (N, C, ...).
    """
    moved = x.movedim(channel_dim, native_dim)
    return moved.flatten(2) if flat and native_dim == 1 and moved.ndim > 2 else moved


def restored(y: Tensor, x: Tensor, channel_dim: int, native_dim: int) -> Tensor:
    """Undo `rearranged` for a norm's output, given the input.

    The output of a contiguous input is contiguous, as a model may view it in another shape.
    """
    back = y.reshape(x.movedim(channel_dim, native_dim).shape).movedim(native_dim, channel_dim)
    return back.contiguous() if x.is_contiguous() else back


class Norm(nn.Module):
    """Mixed in before a torch norm: its channels may be anywhere, and a tail may follow.

    Attributes:
        channel_dim: the input's channel dimension, 1 or -1.
        flattens: whether what follows the channels is seen as one dimension.
        native_dim: where the torch norm expects the channels, 1 or -1.
        spatial: whether positions keep their dimensions always, as neighbours matter.
        tail: names of the children that run after the norm, in order: a fused dropout or
            activation that the layer it replaces had.
        site_path: where the layer stands in the model that it was put into, for error messages.
        own: names of attributes, tensors and children that mean something to this norm only, and
            do not move on to a norm that replaces it.
        references: names of attributes, among these, that are modules elsewhere in the model.
        stands_for: the name of a child, among these, that is an activation which the norm's own
            formula takes the place of; empty for none.
    """

    channel_dim: int = 1
    native_dim: int = 1
    flattens: bool = False
    spatial: bool = False
    tail: tuple[str, ...] = ()
    site_path: str = ""
    own: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    stands_for: str = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Let the instance, not the class, say that it is torch's.

        torch.fx keeps modules whole that say so, as it must a norm: tracing into one would freeze
        its mode and stumble over its checks of shapes.
        """
        self = super().__new__(cls)
        vars(self)["__module__"] = "torch.nn"
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input, of any shape with ``num_features`` channels at ``channel_dim``."""
        x = input  # torch's name, which callers may use
        here, native = self.channel_dim, self.native_dim
        if here == native and (self.spatial or not self.flattens):
            y = self.normalize(x)
        else:
            moved = rearranged(x, here, native, flat=not self.spatial)
            y = restored(self.normalize(moved), x, here, native)
        for name in self.tail:
            y = getattr(self, name)(y)
        return y

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x with its channels at dimension 1."""
        return cast(Tensor, super().forward(x))

    def refer_to(self, **modules: nn.Module | None) -> None:
        """Hold modules that stand elsewhere: no children, so that nothing registers them twice.

        Such a reference is right in a copy and a pickle of the whole model, and follows when a
        conversion or a revert replaces what it refers to.

        Args:
            modules: each by the name that it gets, one of ``references``.
        """
        vars(self).update(modules)

    def refuse_single_value(self, values: int, remedy: str) -> None:
        """Raise if a statistic would be pooled over one value, which erases the input.

        Args:
            values: how many values a statistic is pooled over.
            remedy: what makes them more.
        """
        if values == 1:
            where = f"{self.site_path or 'this layer'} ({type(self).__name__})"
            raise DegeneratePooling(
                f"{where}: each statistic would be pooled over a single value, so every output "
                f"would be the bias; {remedy}, or leave this layer out by skip="
            )


def place(module: Norm, state: NormState) -> Norm:
    """Give a new norm the layout and the tail of the layer that it replaces."""
    if state.channel_dim != module.channel_dim:
        module.channel_dim = state.channel_dim
    if state.flattens:
        module.flattens = True
    if state.tail:
        module.tail = state.tail
    return module
