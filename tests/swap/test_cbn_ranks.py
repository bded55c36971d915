"""Cross-iteration batch normalization over several ranks: as one process with all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.norms.training import CUTS
from tests.reference.data import close, fill, values
from tests.reference.ranks import on_ranks

IN, OUT, STEPS = 3, 4, 5


def net() -> Any:
    model = fill(nn.Sequential(nn.Conv2d(IN, OUT, 3, padding=1), nn.BatchNorm2d(OUT)))
    return normswap.convert(model, "cbn", burnin=1, sync=True)


def train(cut: tuple[int, ...], rank: int | None) -> dict[str, Any]:
    """Five steps of a rank's part of each batch, or of all; weights change as if trained."""
    model = net()
    part = slice(None) if rank is None else slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    seen: dict[str, Any] = {"y": [], "x": []}
    for step in range(STEPS):
        x = values(sum(cut), IN, 5, 4, seed=step)[part].requires_grad_()
        y = model(x)
        y.backward(values(sum(cut), OUT, 5, 4, seed=10 + step)[part])
        seen["y"].append(y.detach())
        seen["x"].append(x.grad)
        with torch.no_grad():
            model[0].weight.add_(values(*model[0].weight.shape, seed=step), alpha=0.05)
            model[0].bias.add_(values(OUT, seed=step), alpha=0.05)
    seen["shares"] = {name: p.grad for name, p in model.named_parameters()}
    seen["kept"] = dict(model[1].named_buffers())
    return seen


def two(rank: int) -> dict[str, Any]:
    return {kind: train(cut, rank) for kind, cut in CUTS[2].items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, two, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["even", "uneven", "empty"])
def test_ranks_are_as_one_process(kind: str, ranks: list[dict[str, Any]]) -> None:
    whole = train(CUTS[2][kind], None)
    parts = [rank[kind] for rank in ranks]
    for step in range(STEPS):
        close(torch.cat([part["y"][step] for part in parts]), whole["y"][step])
        close(torch.cat([part["x"][step] for part in parts]), whole["x"][step])
    for name, gradient in whole["shares"].items():
        close(sum(part["shares"][name] for part in parts), gradient)
    for name, buffer in whole["kept"].items():
        for part in parts:
            close(part["kept"][name], buffer)
