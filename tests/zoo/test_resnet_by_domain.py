"""A ResNet with statistics by domain: on two ranks as in one process, checkpointed as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.reference.data import values
from tests.reference.ranks import on_ranks

timm = pytest.importorskip("timm")

DOMAINS = torch.tensor([0, 1, 0, 1, 1, 0])
CUT = (4, 2)


def resnet(**options: Any) -> Any:
    """In double precision, converted to two domains."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=5).double()
    return normswap.convert(model, "dsbn", num_domains=2, **options)


def images(step: int = 0) -> Tensor:
    return values(len(DOMAINS), 3, 32, 32, seed=step)


def trained(rank: int | None) -> dict[str, Tensor]:
    """Two steps on all samples, or on those of a rank."""
    net = resnet(sync=rank is not None)
    model = net if rank is None else DistributedDataParallel(net)
    part = slice(None) if rank is None else slice(sum(CUT[:rank]), sum(CUT[: rank + 1]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        y = model(images(step)[part], domain=DOMAINS[part])
        # DDP averages over the ranks what is to be summed.
        (y.square().sum() * (1 if rank is None else len(CUT))).backward()
        optimizer.step()
    return dict(net.state_dict())


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    expected = trained(None)
    for state in on_ranks(2, trained, tmp_path):
        assert list(state) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-8)


def test_checkpointed_gradients_are_equal_to_the_bit() -> None:
    found = []
    for checkpointed in (False, True):
        model = resnet().train()
        model.set_grad_checkpointing(checkpointed)
        model(images(), domain=DOMAINS).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
