"""Iterative normalization: that it whitens, its groups, and what it is to other norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from tests.norms.beyond import CHANNELS
from tests.reference.data import close, fill, values

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")


def covariance(x: Tensor) -> Tensor:
    """Of the channels of (N, C, ...), over all else."""
    return x.movedim(1, 0).flatten(1).cov(correction=0)


def mixed(seed: int = 0) -> Tensor:
    """Channels that are correlated."""
    mix = torch.eye(CHANNELS).double() + 0.1 * values(CHANNELS, CHANNELS, seed=90)
    return torch.einsum("oc,nchw->nohw", mix, values(16, CHANNELS, 5, 5, seed=seed))


def test_it_whitens_the_more_the_longer_it_iterates() -> None:
    errors = []
    for iterations in (1, 3, 5, 7, 10):
        norm = normswap.build("iter_norm", CHANNELS, iterations=iterations).double()
        errors.append(float((covariance(norm(mixed()).detach()) - torch.eye(CHANNELS)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < 0.1 < errors[0]


def test_groups_are_whitened_apart() -> None:
    norm = normswap.build("iter_norm", CHANNELS, num_groups=2, iterations=10).double()
    found = covariance(norm(mixed()).detach())
    half = CHANNELS // 2
    for part in (slice(0, half), slice(half, None)):
        torch.testing.assert_close(found[part, part], torch.eye(half).double(), rtol=0, atol=1e-3)
    assert found[:half, half:].abs().max() > 1e-2


def test_a_group_of_one_channel_is_batch_norm() -> None:
    norm = normswap.build("iter_norm", CHANNELS, channels_per_group=1).double()
    torch.testing.assert_close(
        norm(mixed()), normswap.build("bn", CHANNELS).double()(mixed()), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (64, 1), (96, 2), (128, 2), (67, 67)])
def test_groups_have_no_more_than_64_channels(channels: int, groups: int) -> None:
    assert normswap.build("iter_norm", channels).num_groups == groups


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 4},
        {"channels_per_group": 5},
        {"num_groups": 2, "channels_per_group": 3},
        {"iterations": 0},
        {"iterations": 11},
        {"iterations": True},
    ],
)
def test_what_an_option_has_to_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        normswap.build("iter_norm", CHANNELS, **options)


def trained() -> nn.Module:
    """One that has whitened for long."""
    model = nn.Sequential(fill(normswap.build("iter_norm", CHANNELS, momentum=None)))
    for step in range(40):
        model(mixed(seed=step))
    return model


def test_as_it_starts_it_is_a_batch_norm_in_eval_and_no_more_once_it_whitens() -> None:
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(CHANNELS)), "iter_norm")
    (step,) = normswap.plan(model, "bn", where="*", example_inputs=mixed().float())
    assert step.fidelity == "eval"
    (step,) = normswap.plan(trained(), "bn", where="*", example_inputs=mixed())
    assert step.fidelity == "affine"


def test_what_it_learned_tells_the_variances() -> None:
    """W is the inverse root of the covariance, whose diagonal the variances are."""
    model = trained()
    variances = torch.stack([mixed(seed=step).var((0, 2, 3)) for step in range(40)]).mean(0)
    x = mixed(seed=50)
    normswap.convert(model, "bn", where="*", example_inputs=x)
    torch.testing.assert_close(model[0].running_var, variances, rtol=0.2, atol=0)


def test_weight_and_bias_come_after_the_whitening() -> None:
    norm = normswap.build("iter_norm", CHANNELS).double()
    plain = norm(mixed())
    fill(norm)
    close(
        norm(mixed()),
        plain * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1),
    )


@pytest.mark.parametrize("shape", [(4, CHANNELS, 5, 3), (4, CHANNELS, 2, 3, 2)])
def test_the_memory_format_stays(shape: tuple[int, ...]) -> None:
    norm = normswap.build("iter_norm", CHANNELS, dim=len(shape) - 2).double()
    format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = values(*shape)
    assert norm(x).is_contiguous()
    y = norm(x.contiguous(memory_format=format))
    assert y.is_contiguous(memory_format=format)
    close(y, norm(x))
