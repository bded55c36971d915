"""RMSNorm's own default eps is that of the precision it computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normswap

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_torchs_default_eps_is_carried(dtype: torch.dtype, affine: bool) -> None:
    norm = nn.RMSNorm(8, elementwise_affine=affine).to(dtype)
    model = nn.Sequential(nn.Identity(), norm)
    x = (torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    before = model(x)
    assert normswap.plan(model, "rms2d")[0].fidelity == "exact"
    after = normswap.convert(model, "rms2d")(x)
    slack = {torch.bfloat16: 0.02, torch.float16: 0.004}.get(dtype, 1e-6)
    assert float((after - before).detach().double().abs().max()) < slack
