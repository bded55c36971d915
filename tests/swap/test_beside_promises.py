"""Every norm that has learned, to the norms that `test_matrix` leaves: those with a neighbourhood.

What is promised to be the same in eval mode is, whatever numbers the source has come to.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NormSwapError
from tests.extra import REQUIRING

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CHANNELS = 12
ENTRIES = [entry for entry in normswap.list_norms() if entry.name not in REQUIRING]
SOURCES = [entry.name for entry in ENTRIES if entry.stands_alone]
BESIDE = [entry.name for entry in ENTRIES if entry.needs & {"neighbours", "previous", "activation"}]
OTHERS = [
    normswap.spec("evonorm_s0", num_groups=2),
    normswap.spec("frn", activation="keep"),
    normswap.spec("bcn", num_groups=2),
]


def numbers(tensor: Tensor, seed: int) -> Tensor:
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))


def model_of(source: str) -> nn.Sequential:
    """A norm between convolutions, every parameter and statistic of it its own."""
    norm = normswap.build(source, CHANNELS)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.add_(0.3 * numbers(parameter, seed).to(parameter))
        for seed, buffer in enumerate(norm.buffers()):
            if buffer.is_floating_point() and buffer.shape == (CHANNELS,):
                buffer.add_(0.3 * numbers(buffer, seed).to(buffer))
    convs = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
    for seed, conv in enumerate(convs):
        nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(conv.bias)
    return nn.Sequential(convs[0], norm, nn.ReLU(), convs[1]).eval()


@pytest.mark.parametrize("target", [*BESIDE, *OTHERS], ids=str)
@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_what_is_promised_in_eval_mode_holds(source: str, target: str) -> None:
    model = model_of(source)
    x = numbers(torch.empty(8, CHANNELS, 6, 6), 7) * 4 - 1
    before = model(x)
    try:
        plan = normswap.plan(model, target, where="1")
        converted = plan.apply()
    except NormSwapError:
        return  # refused with a reason, which other tests read
    if all(step.fidelity in ("exact", "eval") for step in plan.of("convert")):
        assert float((converted(x) - before).norm() / before.norm()) < 1e-5
