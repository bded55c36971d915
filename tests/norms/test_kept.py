"""A norm by a rule keeps its input for backward, and beside it nothing of the size of a map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normswap
from normswap.norms.measured import MeasuredNorm
from tests.reference.data import values

#: More channels than `an` has mixtures, so that what is kept of these is small too.
SAMPLES, CHANNELS, SIDE = 16, 16, 16

BY_RULE = [
    entry.name
    for entry in normswap.list_norms()
    if entry.stands_alone and isinstance(normswap.build(entry.name, CHANNELS), MeasuredNorm)
]


def test_the_registry_has_some() -> None:
    assert {"sn", "ghost_bn", "cn", "ebn", "bin", "ibn", "adaptive_bn", "iebn"} <= set(BY_RULE)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_RULE)
def test_only_the_input_is_kept(name: str, dtype: torch.dtype, format: torch.memory_format) -> None:
    options = {"group_size": 4} if name == "ghost_bn" else {}
    norm = normswap.build(name, CHANNELS, **options)
    x = values(SAMPLES, CHANNELS, SIDE, SIDE).to(dtype).contiguous(memory_format=format)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x.requires_grad_())
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert places.pop(x.untyped_storage().data_ptr()) == x.untyped_storage().nbytes()
    of_channels = SAMPLES * CHANNELS * torch.float32.itemsize
    assert all(size <= of_channels for size in places.values())
    y.float().sum().backward()
    assert x.grad is not None
