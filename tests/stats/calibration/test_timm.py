"""A timm model, whose norms carry activations that overwrite what the norms compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normswap
from tests.reference.calibration import least_squares
from tests.reference.data import values
from tests.stats.calibration.nets import affines, pair_of, settled


def input_of(model: nn.Module, path: str, data: Tensor) -> Tensor:
    """What one norm is given, which what it fuses may overwrite."""
    seen: list[Tensor] = []
    norm = model.get_submodule(path)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(data)
    handle.remove()
    return seen[0]


def test_every_converted_norm_of_a_timm_model() -> None:
    timm = pytest.importorskip("timm", minversion="1.0")
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        original = timm.create_model("test_efficientnet", num_classes=3).double()
    data = list(values(8, 3, 32, 32).split(2))
    settled(original, torch.cat(data))
    model, _ = pair_of(original, carry="fresh", num_groups=2)
    paths = [row.path for row in normswap.report(model)]
    expected = copy.deepcopy(model)
    for path in paths:  # its children are in the order of their calls
        norm, source = expected.get_submodule(path), original.get_submodule(path)
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
        inputs = [input_of(m, path, torch.cat(data)) for m in (expected, original)]
        with torch.no_grad():
            bare = nn.functional.group_norm(inputs[0], 2, eps=norm.eps)
            wanted = nn.functional.batch_norm(
                inputs[1],
                source.running_mean,
                source.running_var,
                source.weight,
                source.bias,
                False,
                0.0,
                source.eps,
            )
            flat = [y.movedim(1, 0).flatten(1) for y in (bare, wanted)]
            gain, offset = least_squares(*flat)
            norm.weight.copy_(gain)
            norm.bias.copy_(offset)
    report = normswap.calibrate(model, data, refine_passes=0)
    assert len(report.calibrated) == len(paths) > 5
    assert report.kept == "fitted"
    for found, wanted in zip(affines(model), affines(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
