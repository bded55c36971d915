"""Population statistics: those of one train-mode forward of all data as a single batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.errors import StatisticsError
from tests.reference import formulas
from tests.reference.data import close, fill, values
from tests.stats.models import assert_keeps_all_of, cut, images, kept, net, one_norm

CUTS = [[16], [1] * 16, [7, 7, 2], [1, 5, 10]]


def inputs_of_norms(model: nn.Module, data: Tensor) -> dict[str, list[Tensor]]:
    """What each norm is given, call by call, when plain torch trains on all data as one batch."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        module.training = isinstance(module, (_BatchNorm, nn.InstanceNorm2d))
        if isinstance(module, _BatchNorm):
            note = seen.setdefault(path, []).append
            module.register_forward_pre_hook(lambda _, args, note=note: note(args[0].clone()))
    with torch.no_grad():
        model(data)
    return seen


def assert_as_of_one_batch(
    model: nn.Module, data: Tensor, sizes: Sequence[int], **how: object
) -> None:
    """Assert that every norm keeps the statistics of one batch of all, whatever the cut."""
    wanted = inputs_of_norms(model, data)
    normswap.warmup(model, cut(data, sizes), method="population", **how)
    norms = dict(model.named_modules())
    for path, calls in wanted.items():
        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in calls], 1)
        assert_keeps_all_of(norms[path], flat.t())


class Dense(nn.Module):
    """Every stage reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(2 + 3 * i), nn.ReLU(True), nn.Conv2d(2 + 3 * i, 3, 1))
            for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = torch.cat([x, stage(x)], 1)
        return x


class Residual(nn.Module):
    """A branch that is added in place, one norm that is called twice, and no traceable flow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x).relu_()
        if float(y.sum()) > -1:  # no graph without inputs sees past this
            y = self.norm(y)
        y += x
        return self.last(y)


class Caching(nn.Module):
    """What one part keeps on the model, a later part reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * x
        y = self.first(x)
        return self.last(y + self.kept)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("make", [one_norm, net, Dense, Residual, Caching])
def test_it_equals_one_batch_of_all(
    make: Callable[[], nn.Module], sizes: list[int], memory: int | None
) -> None:
    model = fill(make().double())
    assert_as_of_one_batch(model, images(16), sizes, memory=memory)


def test_one_pass_is_enough() -> None:
    read = []
    batches = (read.append(len(batch)) or batch for batch in cut(images(16), [7, 7, 2]))
    report = normswap.warmup(fill(net().double()), batches, method="population")
    assert read == [7, 7, 2]
    assert (report.batches, report.samples) == (3, 16)


def test_forwards_that_disturb_each_other_take_a_loader_that_can_be_read_again() -> None:
    model = fill(Caching().double())
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(StatisticsError, match=r"disturb each other.*there only once"):
        normswap.warmup(model, iter(cut(images(16), [8, 8])), method="population")
    assert all(map(torch.equal, before, model.state_dict().values()))


@pytest.mark.parametrize("to", ["sync_bn", "bn"])
def test_converted_norms_too(to: str) -> None:
    model = normswap.convert(fill(net().double()), to=to, where="*")
    assert_as_of_one_batch(model, images(16), [7, 7, 2])


@pytest.mark.parametrize("memory", [None, 0])
def test_instance_norms_are_averaged_over_samples_on_the_way(memory: int | None) -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.BatchNorm2d(2)
    )
    fill(model.double())
    data = images(16)
    wanted = inputs_of_norms(model, data)["1"][0]
    normswap.warmup(model, cut(data, [7, 7, 2]), method="population", memory=memory)
    close(model[0].running_mean, data.mean((0, 2, 3)))
    close(model[0].running_var, data.var((2, 3)).mean(0))
    assert_keeps_all_of(model[1], wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_data_far_from_zero_keeps_its_variance_in_single_precision(
    layout: torch.memory_format,
) -> None:
    norm = nn.BatchNorm2d(2)
    data = (1e3 + 1e-2 * values(96, 2, 4, 4)).float().contiguous(memory_format=layout)
    normswap.warmup(norm, cut(data, [1, 7, 64, 24]), method="population")
    _, var = formulas.mean_and_unbiased_var(data.double())
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-6, atol=0)


def test_a_batch_that_is_not_finite_is_named_or_left_out() -> None:
    data = images(12)
    bad = torch.full_like(data[:4], float("nan"))
    batches = [data[:4], bad, data[4:]]
    model = fill(net().double())
    before = kept(model[1])
    with pytest.raises(StatisticsError, match=r"1 \(BatchNorm2d\).*batch 1"):
        normswap.warmup(model, batches, method="population")
    assert all(map(torch.equal, before, kept(model[1])))
    other = copy.deepcopy(model)
    report = normswap.warmup(model, batches, method="population", on_nonfinite="skip")
    assert (report.batches, report.skipped) == (2, 1)
    assert_as_of_one_batch(other, data, [12])
    close(model[5].running_var, other[5].running_var)


def test_batches_whose_ways_do_not_meet_are_refused() -> None:
    class Parted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            order = (self.first, self.second) if x.sum() > 0 else (self.second, self.first)
            return order[1](order[0](x))

    model = Parted().double()
    before = kept(model.first)
    with pytest.raises(StatisticsError, match=r"different ways.*pooled"):
        normswap.warmup(model, [images(4).abs(), -images(4).abs()], method="population")
    assert all(map(torch.equal, before, kept(model.first)))


def test_nothing_else_is_changed_and_the_users_batches_are_whole() -> None:
    model, batches = fill(net().double()).train(), cut(images(16), [8, 8])
    copies = [batch.clone() for batch in batches]
    state = torch.get_rng_state()
    normswap.warmup(model, batches, method="population", memory=0)
    assert all(map(torch.equal, batches, copies))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "inception_v3", "efficientnet_b0", "mobilevit_xxs"]
)
def test_models_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = 96 if name == "inception_v3" else 64
    torch.default_generator.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().eval()
    data = torch.randn(6, 3, size, size, dtype=torch.float64)
    wanted = inputs_of_norms(model, data)
    report = normswap.warmup(model, cut(data, [1, 3, 2]), method="population")
    assert {row.path for row in report.estimated} == set(wanted)
    norms = dict(model.named_modules())
    for path, calls in wanted.items():
        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in calls], 1).t()
        mean, var = formulas.mean_and_unbiased_var(flat)
        scale = var.sqrt() + mean.abs()
        assert float(((norms[path].running_mean - mean).abs() / scale).max()) < 1e-10
        torch.testing.assert_close(norms[path].running_var, var, rtol=1e-10, atol=1e-12)


class Scripted(nn.Module):
    """Compiled code, which no watch sees, reads what the first forward has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
        self.scale = torch.jit.script(_product)
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 64).double()
        return self.last(self.scale(self.first(x), self.grid))  # type: ignore[no-any-return]


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_is_kept_on_the_model_stays_in_memory() -> None:
    x = values(24, 64)
    found = []
    for memory in (None, 0):
        model = Scripted().double()
        normswap.warmup(model, x.split(8), method="population", memory=memory, progress=False)
        found.append(model.last.running_var)
    assert torch.equal(*found)
