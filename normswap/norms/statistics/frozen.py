"""FrozenBatchNorm: BatchNorm held at its running statistics and affine, in train mode too.

The practice of detection code bases: y = weight · (x - running_mean) / sqrt(running_var + eps)
+ bias with all four fixed.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import CannotConvert
from normswap.norms.base import Norm, place
from normswap.norms.entry import BATCH_SOURCES, EPS, NormEntry
from normswap.norms.pool import RUNNING, Rule
from normswap.norms.reading import layout, tensors
from normswap.norms.start import Carry, Start, begin
from normswap.norms.state import NormState

__all__ = ["ENTRIES", "FrozenBatchNorm"]


class FrozenBatchNorm(Norm):
    """BatchNorm that nothing moves: not ``train()``, not an optimizer, not ``requires_grad_()``.

    Weight and bias stay `Parameter` objects under their keys, so that checkpoints fit and an
    optimizer that holds them stays valid, but no gradient reaches them.

    Args:
        num_features: C.
        eps: added to the variance. Default 1e-5.
        momentum: kept for a conversion back; unused here.
        dim: how many dimensions follow the channels, kept likewise. Any input (N, C, ...) is
            taken.
    """

    own = ("trainable",)
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.dim = dim
        self.trainable: dict[str, bool] = {}

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...) by the running statistics; the gradient is x's alone."""
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            None if self.weight is None else self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
            training=False,
            eps=self.eps,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Other frozen norms, and BatchNorms of old, save no counter.
        state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say size and eps, as torch's BatchNorm does."""
        return f"{self.num_features}, eps={self.eps}"


def read_frozen_batch_norm(module: nn.Module) -> NormState:
    """Read our FrozenBatchNorm, or any other that holds the same four tensors and eps.

    Those of torchvision, detectron2 and timm are for maps of two dimensions, hold buffers only
    and remember neither momentum nor what was trainable.
    """
    held: Any = module
    given = tensors(module)
    return NormState(
        norm="frozen_bn",
        kind="batch_norm",
        num_features=len(held.running_mean),
        rule=Rule.always(RUNNING),
        eps=held.eps,
        momentum=getattr(module, "momentum", 0.1),
        dim=module.dim if isinstance(module, FrozenBatchNorm) else 2,
        trainable=dict(module.trainable) if isinstance(module, FrozenBatchNorm) else {},
        settings={"eps": held.eps},
        **given,
        **layout(module),
    )


def start_frozen_batch_norm(
    state: NormState, *, carry: Carry = "auto", eps: float | None = None
) -> Start:
    """Start a FrozenBatchNorm; evaluates as the BatchNorm did, bit for bit."""
    if state.kind and not state.tracks:
        raise CannotConvert(
            "it keeps no running statistics, so there is nothing to freeze it at",
            'convert it to "bn" and run normswap.warmup first',
        )

    def shell() -> nn.Module:
        module = FrozenBatchNorm(
            state.num_features,
            eps=state.eps if eps is None else eps,
            momentum=state.momentum,
            dim=state.dim,
        )
        module.trainable = {
            name: tensor is None or tensor.requires_grad
            for name, tensor in (("weight", state.weight), ("bias", state.bias))
        }
        return place(module, state)

    return begin(
        state, shell, Rule.always(RUNNING), carry=carry, eps=eps, running=True, frozen=True
    )


ENTRIES = (
    NormEntry(
        name="frozen_bn",
        aliases=("frozen_batch_norm", "frozenbn"),
        kind="batch_norm",
        axis="statistics",
        pooled="nothing: the running statistics",
        paper="practice of detection code bases",
        sources=BATCH_SOURCES,
        start=start_frozen_batch_norm,
        reads={FrozenBatchNorm: read_frozen_batch_norm},
        options=(EPS,),
    ),
)
