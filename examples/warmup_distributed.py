"""Warm-up on several ranks: each reads its own uneven shard, and all end with the same statistics.

Run it with ``torchrun --nproc-per-node 2 examples/warmup_distributed.py``. The ranks share
scikit-learn's digits three to one and warm up a small net, ``"pooled"`` and ``"population"``. One
process then does the same on all digits, and the statistics are compared.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normswap
from normswap.table import render

BATCH = 64


def small_net() -> nn.Module:
    """Two norms, so that the second is fed by the first."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
    ).double()


def statistics(method: str, batches: list[Tensor]) -> Tensor:
    """All running means and variances after a warm-up on these batches."""
    model = small_net()
    normswap.warmup(model, batches, method=method)
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    return torch.cat([torch.cat([norm.running_mean, norm.running_var]) for norm in norms])


def main() -> None:
    """Compare the ranks with each other and with one process."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, _ = load_digits(return_X_y=True)
    batches = list((torch.tensor(images).view(-1, 1, 8, 8) / 16).split(BATCH))
    mine = [batch for i, batch in enumerate(batches) if min(i % (ranks + 2), ranks - 1) == rank]
    together = {method: statistics(method, mine) for method in ("pooled", "population")}
    read = torch.tensor([sum(map(len, mine))])
    shards = [torch.empty_like(read) for _ in range(ranks)]
    dist.all_gather(shards, read)
    differing = False
    for found in together.values():
        others = [torch.empty_like(found) for _ in range(ranks)]
        dist.all_gather(others, found)
        differing |= any(not torch.equal(found, other) for other in others)
    dist.destroy_process_group()
    if rank > 0:
        return
    apart = {method: (found - statistics(method, batches)) for method, found in together.items()}
    rows = [(method, f"{float(delta.abs().max()):.1e}") for method, delta in apart.items()]
    print(render("Warm-up on ranks", ("method", "largest difference to one process"), rows))
    print(f"images read by each rank: {', '.join(str(int(shard)) for shard in shards)}")
    print(f"ranks {'differ' if differing else 'are equal to the last bit'}")


if __name__ == "__main__":
    main()
