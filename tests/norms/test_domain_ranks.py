"""Norms by domain, condition or region over several ranks: one process with all samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.reference.data import close, fill, values
from tests.reference.ranks import on_ranks

STEPS = 3
SAMPLES = 6
CUTS = {"even": (3, 3), "uneven": (5, 1), "empty": (6, 0)}
#: The second rank of the even cut has none of domain 0.
IDS = torch.tensor([0, 0, 1, 2, 1, 2])
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dsbn": ("dsbn", {"num_domains": 3}, "domain"),
    "cond_bn": ("cond_bn", {"num_classes": 3}, "label"),
    "split_bn": ("split_bn", {"affine": "separate"}, "labelled"),
    "rn_b": ("rn_b", {}, "mask"),
    "rn_b official": ("rn_b", {"eps_scaled": False, "official_bias": True}, "mask"),
}
GIVEN = {
    "domain": IDS,
    "label": IDS,
    "labelled": IDS == 1,
    #: The second rank of the uneven cut has nothing outside.
    "mask": (values(SAMPLES, 1, 6, 5, seed=9) > 0) | (torch.arange(SAMPLES) == 5).view(-1, 1, 1, 1),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(F.relu(self.norm1(self.conv(x))))


def train(case: str, cut: tuple[int, ...], rank: int, *, wrapped: bool) -> dict[str, Tensor]:
    """Three steps of one rank on its part of each batch."""
    to, options, name = CASES[case]
    net = normswap.convert(fill(Net()), to=to, sync=wrapped, **options)
    model: Any = DistributedDataParallel(net) if wrapped else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    part = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    for step in range(STEPS):
        optimizer.zero_grad()
        y = model(values(SAMPLES, 3, 6, 5, seed=step)[part], **{name: GIVEN[name][part]})
        loss = (y - 1).square().sum() / SAMPLES
        # DDP averages over the ranks what is to be summed.
        (loss * (len(cut) if wrapped else 1)).backward()
        optimizer.step()
    return dict(net.state_dict())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_under_ddp_train_as_one_process(case: str, cut: str, tmp_path: Path) -> None:
    expected = train(case, (SAMPLES,), 0, wrapped=False)
    ranks = on_ranks(2, partial(train, case, CUTS[cut], wrapped=True), tmp_path)
    for state in ranks:
        assert list(state) == list(expected)
        for name, value in expected.items():
            close(state[name], value)
