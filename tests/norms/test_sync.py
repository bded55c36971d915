"""Statistics over several ranks, on the CPU: what one process would do with all the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from normswap.norms.sync import merged, synchronized_batch_norm
from tests.norms.cases import CHANNELS
from tests.norms.training import CUTS, SETTINGS, STEPS, run_by_formula, run_one_rank
from tests.reference import formulas
from tests.reference.data import close, fill, values
from tests.reference.ranks import lone_rank, on_ranks

Results = list[dict[str, Any]]

NORMS = ("bn", "sn", "sync_bn")


def everything(rank: int) -> dict[str, Any]:
    """What one rank does; every rank does all of it in the same order."""
    world = dist.get_world_size()
    cuts = CUTS[world]
    result: dict[str, Any] = {
        f"{name}, {kind}": run_one_rank(setting, cut, rank)
        for name, setting in SETTINGS.items()
        for kind, cut in cuts.items()
    }
    result["one value"] = {norm: refusal(norm, rank) for norm in NORMS}
    result["alone"] = {norm: evaluated_alone(norm, rank) for norm in NORMS}
    if world == 2:
        result["data parallel"] = data_parallel_step(rank)
        result["data parallel refuses"] = data_parallel_refusal()
    if world == 3:
        result["first two"] = first_two(rank)
    return result


def refusal(norm: str, rank: int) -> str:
    """What a rank hears when all together have a single value."""
    x = torch.ones(1 if rank == 0 else 0, CHANNELS).double()
    try:
        SETTINGS[f"{norm} without positions"].build()(x)
    except ValueError as error:
        return str(error)
    return ""


def evaluated_alone(norm: str, rank: int) -> Tensor:
    """The eval output of the first rank, while the others do not take part."""
    module = SETTINGS[norm].build().eval()
    return module(SETTINGS[norm].batch(3, 0)) if rank == 0 else torch.empty(0)


def small_net() -> nn.Module:
    """A convolution and its norm, before any conversion."""
    return fill(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))


def data_parallel_step(rank: int) -> list[Tensor]:
    """The gradients of one step of a wrapped model with the ``sync`` option."""
    wrapped = DistributedDataParallel(normswap.convert(small_net(), "bn", sync=True))
    wrapped(step_input()[2 * rank : 2 * rank + 2]).square().sum().backward()
    return [parameter.grad for parameter in wrapped.parameters()]


def step_input() -> Tensor:
    return values(4, 2, 3, 3)


def data_parallel_refusal() -> str:
    """What torch says to a SyncBatchNorm on the CPU."""
    try:
        DistributedDataParallel(normswap.convert(small_net(), "sync_bn"))
    except Exception as error:
        return str(error)
    return ""


def first_two(rank: int) -> Tensor:
    """The mean that a norm keeps whose group is the first two ranks."""
    group = dist.new_group([0, 1])
    if rank > 1:
        return torch.empty(0)
    norm = normswap.build("bn", CHANNELS, sync=True, process_group=group, momentum=1.0).double()
    norm(values(2, CHANNELS, 2, 2, seed=rank))
    return norm.running_mean


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two ranks got."""
    return on_ranks(2, everything, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of three ranks got."""
    return on_ranks(3, everything, tmp_path_factory.mktemp("trio"))


@pytest.fixture(params=["pair", "trio"])
def ranks(request: pytest.FixtureRequest) -> Results:
    """Two ranks, and three."""
    results: Results = request.getfixturevalue(request.param)
    return results


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    with lone_rank(tmp_path):
        yield


def by_formula(
    name: str, kind: str, ranks: Results
) -> tuple[dict[str, list[Tensor]], formulas.Running]:
    return run_by_formula(SETTINGS[name], sum(CUTS[len(ranks)][kind]))


each_setting = pytest.mark.parametrize("name", SETTINGS)
each_cut = pytest.mark.parametrize("kind", ["even", "uneven", "empty"])


@each_cut
@each_setting
@pytest.mark.parametrize("what", ["outputs", "gradients", "second"])
def test_ranks_together_are_one_process(ranks: Results, name: str, kind: str, what: str) -> None:
    expected, _ = by_formula(name, kind, ranks)
    for step in range(STEPS):
        parts = [rank[f"{name}, {kind}"][what][step] for rank in ranks]
        close(torch.cat(parts), expected[what][step])


@each_cut
@each_setting
def test_parameter_gradients_of_the_ranks_add_up(ranks: Results, name: str, kind: str) -> None:
    expected, _ = by_formula(name, kind, ranks)
    shares = [rank[f"{name}, {kind}"]["parameters"] for rank in ranks]
    assert len(shares[0]) == len(expected["parameters"])
    for share, whole in zip(zip(*shares, strict=True), expected["parameters"], strict=True):
        close(torch.stack(share).sum(0), whole)


@each_cut
@pytest.mark.parametrize("name", [name for name in SETTINGS if "untracked" not in name])
def test_every_rank_keeps_the_statistics_of_all(ranks: Results, name: str, kind: str) -> None:
    _, running = by_formula(name, kind, ranks)
    for rank in ranks:
        buffers = rank[f"{name}, {kind}"]["buffers"]
        close(buffers["running_mean"], running.mean)
        close(buffers["running_var"], running.var)
        assert buffers["num_batches_tracked"] == STEPS


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_value_over_all_ranks_is_refused_on_each(ranks: Results, norm: str) -> None:
    for rank in ranks:
        assert "more than one value per channel over all ranks" in rank["one value"][norm]


@pytest.mark.parametrize("norm", NORMS)
def test_one_rank_alone_may_evaluate(ranks: Results, norm: str) -> None:
    module, x = SETTINGS[norm].build().eval(), SETTINGS[norm].batch(3, 0)
    close(ranks[0]["alone"][norm], module(x))


def test_data_parallel_takes_the_sync_option_on_the_cpu(pair: Results) -> None:
    model = small_net()
    model(step_input()).square().sum().backward()
    for rank in pair:
        for gradient, parameter in zip(rank["data parallel"], model.parameters(), strict=True):
            close(gradient, parameter.grad / 2)


def test_data_parallel_refuses_sync_batch_norm_on_the_cpu(pair: Results) -> None:
    for rank in pair:
        assert "SyncBatchNorm" in rank["data parallel refuses"]


def test_a_group_of_some_ranks_pools_over_those(trio: Results) -> None:
    both = torch.cat([values(2, CHANNELS, 2, 2, seed=rank) for rank in (0, 1)])
    mean, _ = formulas.mean_and_unbiased_var(both)
    for rank in trio[:2]:
        close(rank["first two"], mean)


@pytest.mark.parametrize("name", ["bn", "sync_bn"])
def test_a_group_of_one_is_as_no_group(alone: None, name: str) -> None:
    norm, x = SETTINGS[name].build(), SETTINGS[name].batch(4, 0)
    expected = normswap.build("bn", CHANNELS).double()
    expected.load_state_dict(norm.state_dict())
    close(norm(x), expected(x))
    close(norm.running_var, expected.running_var)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3)])
def test_numerical_gradients(alone: None, check: Any, shape: tuple[int, ...]) -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return synchronized_batch_norm(
            x, weight, bias, None, None, factor=0.0, eps=1e-5, group=None
        )

    inputs = (values(*shape), values(2, seed=1), values(2, seed=2))
    assert check(norm, [x.requires_grad_() for x in inputs])


def test_counts_are_exact_beyond_what_single_precision_holds(alone: None) -> None:
    count = 2**24 + 1
    mean, m2 = torch.zeros(2), torch.full((2,), 3.0)
    _, var, total = merged(count, mean, m2, group=None, name="norm")
    assert total == count
    close(var, torch.full((2,), 3.0 / count).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(alone: None, dtype: torch.dtype) -> None:
    x = (values(64, 2, 8, 8) + 30).to(dtype)
    mean, var = formulas.mean_and_unbiased_var(x.double())
    kept = torch.zeros(2), torch.ones(2)
    y = synchronized_batch_norm(x, None, None, *kept, factor=1.0, eps=1e-5, group=None)
    assert y.dtype == dtype
    torch.testing.assert_close(kept[0], mean.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(kept[1], var.float(), rtol=1e-5, atol=0)


def test_a_large_mean_does_not_spoil_the_variance(alone: None) -> None:
    x = 1e3 + 1e-2 * values(32, 2, 4, 4)
    kept = torch.zeros(2).double(), torch.ones(2).double()
    synchronized_batch_norm(x, None, None, *kept, factor=1.0, eps=1e-5, group=None)
    _, var = formulas.mean_and_unbiased_var(x)
    torch.testing.assert_close(kept[1], var, rtol=1e-6, atol=0)
