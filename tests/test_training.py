"""A ResNet-18 of every norm trains on real images, as it is made and from warmed-up statistics.

They take minutes, and run only when asked for: ``pytest -m slow``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.demo.digits import load_digits
from tests.reference.threads import one_thread

__all__ = ["one_thread"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning"),
]

#: One image of each digit, so that nothing but the images tells them apart.
STEPS, RATE = 10, 4e-4
#: What the loss has to fall to, of what it was, in one of the last steps: single steps may jump.
FALL, LAST = 0.6, 3

NORMS = [entry.name for entry in normswap.list_norms() if not entry.inputs]


@dataclass(frozen=True)
class Start:
    """Networks with BatchNorm that have not been trained, and images."""

    fresh: nn.Module
    warmed: nn.Module
    images: Tensor
    labels: Tensor
    unseen: Tensor


@pytest.fixture(scope="module")
def start() -> Start:
    timm = pytest.importorskip("timm", minversion="1.0")
    pytest.importorskip("sklearn")
    digits = load_digits()
    images, labels = digits.train.tensors
    rows = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        # The last maps have 2 × 2 positions: what pools over positions alone needs some.
        fresh = timm.create_model(
            "resnet18", in_chans=1, num_classes=10, output_stride=16, zero_init_last=False
        )
    warmed = copy.deepcopy(fresh)
    normswap.warmup(warmed, images[:256].split(64))
    return Start(fresh, warmed, images[rows], labels[rows], digits.test.tensors[0][:2])


@pytest.mark.parametrize("state", ["fresh", "warmed"])
@pytest.mark.parametrize("name", NORMS)
def test_training(start: Start, name: str, state: str) -> None:
    model = normswap.convert(
        copy.deepcopy(getattr(start, state)),
        to=name,
        where="kind:batch_norm",
        example_inputs=start.images,
        strict=True,
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(start.images), start.labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert min(losses[-LAST:]) < FALL * losses[0], losses
    with torch.no_grad():
        assert model.eval()(start.unseen).isfinite().all()
