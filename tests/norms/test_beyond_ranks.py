"""Norms that keep statistics of their own, over several ranks: one process with all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import normswap
from tests.norms.beyond import BEYOND, CHANNELS, Beyond, buffers_of, parameters_of
from tests.norms.training import CUTS
from tests.reference.data import close, values
from tests.reference.ranks import on_ranks

SYNCHRONIZED = {
    str(case): case
    for case in BEYOND
    if any(option.name == "sync" for option in normswap.spec(case.norm).entry.options)
    and not case.options.get("per_sample")
    and case.options.get("nonlinearity", True)  # without, there is nothing to pool
}
SAMPLE = (CHANNELS, 3, 2)
STEPS = 3

Results = list[dict[str, Any]]
each_case = pytest.mark.parametrize("name", SYNCHRONIZED)
each_cut = pytest.mark.parametrize("kind", ["even", "uneven", "empty"])


def batch(samples: int, step: int) -> Tensor:
    return values(samples, *SAMPLE, seed=40 + step)


def train(case: Beyond, cut: tuple[int, ...], rank: int) -> dict[str, Any]:
    """Three steps of one rank's norm on its part of each batch."""
    norm = case.build()
    norm.sync = True
    part = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    outputs, slopes = [], []
    for step in range(STEPS):
        x = batch(sum(cut), step)[part].requires_grad_()
        y = norm(x)
        y.backward(batch(sum(cut), step + 10)[part])
        outputs.append(y.detach())
        slopes.append(x.grad)
    shares = {name: p.grad for name, p in norm.named_parameters()}
    return {"outputs": outputs, "slopes": slopes, "shares": shares, "kept": buffers_of(norm)}


def everything(rank: int) -> dict[str, Any]:
    cuts = CUTS[dist.get_world_size()]
    result: dict[str, Any] = {
        f"{name}, {kind}": train(case, cut, rank)
        for name, case in SYNCHRONIZED.items()
        for kind, cut in cuts.items()
    }
    result["refused"] = {name: refusal(case, rank) for name, case in SYNCHRONIZED.items()}
    return result


def refusal(case: Beyond, rank: int) -> str:
    """What a rank hears when all together have a single value."""
    norm = case.build()
    norm.sync = True
    try:
        norm(torch.ones(1 if rank == 0 else 0, CHANNELS).double())
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return on_ranks(request.param, everything, tmp_path_factory.mktemp("ranks"))


@each_cut
@each_case
def test_ranks_together_are_one_process(ranks: Results, name: str, kind: str) -> None:
    case, cut = SYNCHRONIZED[name], CUTS[len(ranks)][kind]
    samples, formula = sum(cut), case.formula if case.of_ranks is None else case.of_ranks(*cut)
    norm = case.build()
    parameters, buffers = parameters_of(norm), buffers_of(norm)
    seen = [rank[f"{name}, {kind}"] for rank in ranks]
    for step in range(STEPS):
        x = batch(samples, step).requires_grad_()
        y = formula(x, parameters, buffers, True)
        y.backward(batch(samples, step + 10))
        close(torch.cat([each["outputs"][step] for each in seen]), y)
        close(torch.cat([each["slopes"][step] for each in seen]), x.grad)
    for key, parameter in parameters.items():
        close(torch.stack([each["shares"][key] for each in seen]).sum(0), parameter.grad)
    for each in seen:
        for key, buffer in buffers.items():
            close(each["kept"][key], buffer)


@each_case
def test_a_single_value_over_all_ranks_is_refused_on_each(ranks: Results, name: str) -> None:
    for rank in ranks:
        assert "more than one value per channel over all ranks" in rank["refused"][name]
