"""Synchronised BatchNorm under DDP on CPU ranks, where torch's SyncBatchNorm is refused.

Run it with ``torchrun --nproc-per-node 2 examples/ddp_on_cpu.py``. Two ranks train a small net on
scikit-learn's digits with batches of different sizes, 24 and 8; their BatchNorms pool over both.
One process then trains the same net on the same batches of 32, and the two nets are compared.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import normswap

SIZES = (24, 8)
EPOCHS = 2


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).double()


def train(model: nn.Module, x: Tensor, y: Tensor, part: slice, scale: float) -> None:
    """Train on one part of every batch; ``scale`` makes the ranks' mean gradient the batch's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(sum(SIZES))[:-1]:
            mine = batch[part]
            optimizer.zero_grad()
            loss = cross_entropy(model(x[mine]), y[mine], reduction="sum") / sum(SIZES)
            (loss * scale).backward()
            optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float64).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)

    model = normswap.convert(small_net(), to="bn", sync=True)
    start = sum(SIZES[:rank])
    part = slice(start, start + SIZES[rank])
    train(DistributedDataParallel(model), x, y, part, scale=ranks)
    dist.barrier()
    dist.destroy_process_group()
    if rank > 0:
        return

    print(normswap.report(model))
    alone = small_net()
    train(alone, x, y, slice(None), scale=1.0)
    pairs = zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == y).double().mean()
    print(f"accuracy on the training digits: {accuracy:.1%}")
    print(f"largest difference to one process, weights and statistics: {difference:.1e}")


if __name__ == "__main__":
    main()
