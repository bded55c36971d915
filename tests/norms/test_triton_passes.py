"""The passes as Triton programs: on CUDA where there is such a device, and in Triton's interpreter.

The interpreter runs them on the processor, one after the other, and has to be asked for before
Triton is imported: one test here runs this file again in a process that does. What the compiler
makes of them is checked without a device too, on tensors without values.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.norms import passes
from normswap.norms.moments import normalized
from normswap.norms.passes import plain
from normswap.norms.passes.shapes import layout
from tests.norms.test_moments import SLACK, laid_out, mixing, near, textbook
from tests.reference import passes as formulas
from tests.reference.data import values

triton = pytest.importorskip("triton")

from normswap.norms.passes import kernels, launch  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_CUDA else "cpu"

NOWHERE = "neither CUDA nor the interpreter"
runs = pytest.mark.skipif(not (ON_CUDA or INTERPRETED), reason=NOWHERE)
on_cuda = pytest.mark.skipif(not ON_CUDA, reason="no CUDA device")
compiles = pytest.mark.skipif(
    INTERPRETED
    or "constexprs" not in inspect.signature(triton.compiler.ASTSource.__init__).parameters,
    reason="Triton's compiler is asked otherwise in this version, or not at all",
)

LAYOUTS = ["contiguous", "channels last"]
#: Values in a tile, channels in one where they come last, and programs that are enough: as they
#: are, and so few that small maps have many tiles, and many parts.
SIZES = {"as it is": None, "small": (16, 4, 12)}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and parts of every size."""
    cut(SIZES[request.param], monkeypatch)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(SIZES["small"], monkeypatch)


def cut(sizes: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in zip(("TILE", "WIDE", "PROGRAMS"), sizes or (), strict=False):
        monkeypatch.setattr(launch, name, number)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms run the programs: on CUDA by themselves, in the interpreter as if this were CUDA."""
    if INTERPRETED:
        way = passes._way
        monkeypatch.setattr(passes, "_way", lambda x: launch if x.numel() and layout(x) else way(x))


def test_in_the_interpreter() -> None:
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert NOWHERE not in done.stdout


# Positions are just less, as many, and just more than a tile's or a part's, and one.
SHAPES = [(5, 6), (1, 1, 1, 1), (3, 1, 15), (2, 3, 4, 4), (1, 9, 17), (1, 3, 129), (1, 5, 2, 3, 8)]


@runs
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes_are_the_formulas(shape: tuple[int, ...], dtype: torch.dtype, order: str) -> None:
    x, dy = (values(*shape, seed=seed).to(DEVICE, dtype) for seed in (0, 1))
    x = laid_out(x, order)
    work = torch.promote_types(dtype, torch.float32)
    gain, slope, shift = (values(*shape[:2], seed=seed).to(DEVICE, work) for seed in (2, 3, 4))

    for got, expected in zip(launch.moments(x), formulas.moments(x), strict=True):
        assert got.dtype == work
        near(got, expected, work)
    sums = zip(launch.channel_sums(dy, x, gain), formulas.channel_sums(dy, x, gain), strict=True)
    for got, expected in sums:
        assert got.dtype == work
        near(got, expected, work)
    y, dx = launch.scaled(x, gain, shift), launch.combined(dy, x, gain, slope, shift)
    near(y, formulas.scaled(x, gain, shift), dtype)
    near(dx, formulas.combined(dy, x, gain, slope, shift), dtype)
    for each in (y, dx):
        assert each.dtype == dtype
        assert each.stride() == x.stride()


@runs
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 8193), (1, 70, 127), (2, 3, 1025)], ids=str)
def test_tiles_and_parts_as_they_are(shape: tuple[int, ...], order: str) -> None:
    x = laid_out(values(*shape).float().to(DEVICE), order)
    dy, mean = values(*shape, seed=1).float().to(DEVICE), values(*shape[:2]).float().to(DEVICE)
    got = (*launch.moments(x), *launch.channel_sums(dy, x, mean))
    exact = (*formulas.moments(x), *formulas.channel_sums(dy, x, mean))
    for one, other in zip(got, exact, strict=True):
        near(one, other, torch.float32)
    near(launch.scaled(x, mean, mean), formulas.scaled(x, mean, mean), torch.float32)


@runs
@pytest.mark.parametrize("order", LAYOUTS)
def test_statistics_may_be_expanded(order: str) -> None:
    x, dy = (laid_out(values(3, 4, 5, seed=seed).to(DEVICE), order) for seed in (0, 1))
    wide = values(4).to(DEVICE).expand(3, 4)
    near(launch.scaled(x, wide, wide), formulas.scaled(x, wide, wide), torch.float64)
    got = launch.combined(dy, x, wide, wide, wide)
    near(got, formulas.combined(dy, x, wide, wide, wide), torch.float64)
    for one, other in zip(
        launch.channel_sums(dy, x, wide), formulas.channel_sums(dy, x, wide), strict=True
    ):
        near(one, other, torch.float64)


@runs
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("positions", [20, 130])
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e4, 1.0), (1e3, 1e-2), (-1.0, 1e-4), (0.0, 1e-12)]
)
def test_a_large_mean_does_not_spoil_the_variance(
    mean: float, deviation: float, order: str, positions: int
) -> None:
    x = laid_out((mean + deviation * values(2, 5, positions)).float().to(DEVICE), order)
    x[0, 0, 0] = 0  # what all else is measured from may be the one that is far away
    got_mean, got_var = launch.moments(x)
    exact_mean, exact_var = formulas.moments(x)
    torch.testing.assert_close(got_mean.double(), exact_mean, rtol=1e-6, atol=1e-7 * deviation)
    torch.testing.assert_close(got_var.double(), exact_var, rtol=1e-5, atol=0)


@runs
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("order", LAYOUTS)
def test_a_constant_has_no_variance(order: str, dtype: torch.dtype) -> None:
    x = laid_out(torch.full((2, 3, 70), 0.1, dtype=dtype, device=DEVICE), order)
    mean, var = launch.moments(x)
    assert torch.equal(mean, x[..., 0].to(mean.dtype))
    assert (var == 0).all()


@runs
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("place", [0, 2, 69])
@pytest.mark.parametrize("order", LAYOUTS)
def test_what_is_not_finite_shows(order: str, place: int) -> None:
    x = values(2, 3, 70).to(DEVICE)
    x[0, 1, place] = float("nan")
    bad = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    bad[0, 1] = True
    for statistic in launch.moments(laid_out(x, order)):
        assert torch.equal(statistic.isnan(), bad)


@runs
@pytest.mark.usefixtures("dispatched", "small")
@pytest.mark.parametrize("order", [*LAYOUTS, "strided"])
@pytest.mark.parametrize(
    "shape", [(3, 4), (2, 3, 1, 1), (2, 5, 6, 7), (0, 3, 2), (2, 3, 0)], ids=str
)
def test_norms_and_their_gradients_are_the_formulas(shape: tuple[int, ...], order: str) -> None:
    data, direction = (values(*shape, seed=seed) for seed in (0, 1))
    x = laid_out(data.to(DEVICE), order).clone().requires_grad_()
    parameters = [values(shape[1], seed=seed).to(DEVICE).requires_grad_() for seed in (2, 3)]
    y = normalized(x, mixing(*parameters))
    y.backward(laid_out(direction.to(DEVICE), "channels last"))

    exact = data.clone().requires_grad_()
    theirs = [each.detach().cpu().requires_grad_() for each in parameters]
    expected = textbook(exact, *theirs)
    expected.backward(direction)
    near(y.detach().cpu(), expected.detach(), torch.float64)
    for mine, other in zip((x, *parameters), (exact, *theirs), strict=True):
        near(mine.grad.cpu(), other.grad, torch.float64)


@runs
@pytest.mark.usefixtures("dispatched")
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check: Callable[..., bool], order: str) -> None:
    x = laid_out(values(2, 2, 2).to(DEVICE), order).requires_grad_()
    weight, bias = (values(2, seed=seed).to(DEVICE).requires_grad_() for seed in (2, 5))
    assert check(lambda x, w, b: normalized(x, mixing(w, b)), (x, weight, bias))


@on_cuda
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(8, 64, 56, 56), (4, 512, 7, 7), (1, 3, 1_000_001), (70_000, 3, 2)], ids=str
)
def test_large_maps_on_cuda(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> None:
    x = laid_out(values(*shape).to(DEVICE, dtype), order)
    dy = laid_out(values(*shape, seed=1).to(DEVICE, dtype), order)
    mean, var = passes.moments(x)
    for got, expected in zip((mean, var), formulas.moments(x), strict=True):
        near(got, expected, mean.dtype)
    sums = zip(passes.channel_sums(dy, x, mean), formulas.channel_sums(dy, x, mean), strict=True)
    for got, expected in sums:
        # Sums of many terms cancel: rounding is of their lengths.
        most = max((formulas.flat(dy).norm(dim=2) * formulas.flat(x).norm(dim=2)).max().item(), 1)
        assert (got.double() - expected).abs().max() <= SLACK[mean.dtype] * most
    near(passes.scaled(x, mean, var), formulas.scaled(x, mean, var), dtype)
    got = passes.combined(dy, x, mean, var, mean)
    near(got, formulas.combined(dy, x, mean, var, mean), dtype)


@on_cuda
def test_cuda_is_served_by_the_programs_where_nothing_watches() -> None:
    from torch._subclasses import FakeTensorMode

    x = values(2, 3, 4).to(DEVICE)
    assert passes._way(x) is launch
    assert passes._way(laid_out(x, "channels last")) is launch
    assert passes._way(laid_out(x, "strided")) is plain
    with FakeTensorMode() as mode:
        assert passes._way(mode.from_tensor(x)) is plain


@on_cuda
@pytest.mark.parametrize("name", ["sn", "ghost_bn", "in"])
def test_compiles_on_cuda(name: str) -> None:
    options = {"group_size": 2} if name == "ghost_bn" else {}
    norm = normswap.build(name, 6, **options).to(DEVICE).double()
    model = nn.Sequential(norm, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True)
    x, other = (values(4, 6, 5, 7).to(DEVICE).requires_grad_() for _ in range(2))
    y, expected = compiled(x), model(other)
    near(y.detach(), expected.detach(), torch.float64)
    y.square().sum().backward(), expected.square().sum().backward()
    near(x.grad, other.grad, torch.float64)


class Recorder:
    """In the place of the kernels: keeps what each would be launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(kernels, name)

        def run(*args: Any, **told: Any) -> None:
            named = dict(zip(kernel.arg_names, args, strict=False))
            self.launches.append((kernel, {**named, **told}))

        class Gridded:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                assert 0 < grid[0] < 2**31
                return run

        return Gridded()


POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


def compiled(kernel: Any, told: dict[str, Any], capability: int) -> Any:
    """A kernel as Triton's launcher would have it compiled: sizes of 1 are constants."""
    from triton.backends.compiler import GPUTarget

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = told[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif name.isupper() or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
        if isinstance(value, Tensor) or (signature[name] != "constexpr" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


# All sizes one; few; such as are cut in parts and take 64 bits; such as take them alone.
COMPILED = [(1, 1), (3, 5, 7, 7), (2, 3, 2**31), (1, 2**31, 9)]


@compiles
@pytest.mark.parametrize(
    ("capability", "dtype", "order"),
    [
        (75, torch.float32, "contiguous"),
        (80, torch.bfloat16, "channels last"),
        (90, torch.float64, "contiguous"),
    ],
    ids=str,
)
def test_every_launch_compiles(
    capability: int, dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorder = Recorder()
    monkeypatch.setattr(launch, "kernels", recorder)
    for shape in COMPILED:
        x = torch.empty(shape, device="meta", dtype=dtype)
        if order == "channels last":
            x = torch.empty(shape[0], *shape[2:], shape[1], device="meta", dtype=dtype)
            x = x.movedim(-1, 1)
        mean, var = launch.moments(x)
        launch.channel_sums(x, x, mean)
        launch.scaled(x, mean, var)
        launch.combined(x, x, mean, var, mean)
    seen = {kernel for kernel, _ in recorder.launches}
    assert len(seen) == len(kernels.__all__)
    for kernel, told in recorder.launches:
        assert "ld.global" in compiled(kernel, told, capability).asm["ptx"]
