"""Every norm to every other, over layouts, precisions, modes and affines in all pairs of these.

The pairs of norms are the registry's own; of the other factors each two values meet for each pair
of norms (a pairwise covering array, not the full product).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import NothingToConvert
from tests.extra import REQUIRING
from tests.swap.helpers import KEEPING, RETOLD, filled, meeting, numbers

pytestmark = pytest.mark.filterwarnings("ignore::normswap.errors.NormSwapWarning")

CHANNELS = 32
NORMS = [
    entry.name
    for entry in normswap.list_norms()
    if "neighbours" not in entry.needs and entry.name not in REQUIRING
]

FACTORS: dict[str, tuple[Any, ...]] = {
    "dim": (1, 2, 3),
    "affine": ("both", "weight", "none"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
    "training": (True, False),
    "trainable": (True, False),
    "tracks": (True, False),
}

#: Sources whose running statistics are optional.
OPTIONAL = ("bn", "in")

TRACKING = (*KEEPING, *RETOLD, "in")
SLACK = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every two values of different factors meet, greedily few."""
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows = []
    every = [dict(zip(factors, row, strict=True)) for row in itertools.product(*factors.values())]
    while pairs:
        best = max(every, key=lambda row: len(pairs & set(itertools.combinations(row.items(), 2))))
        pairs -= set(itertools.combinations(best.items(), 2))
        rows.append(best)
    return rows


ROWS = covering(FACTORS)


def test_the_rows_cover_every_pair_of_values() -> None:
    seen = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    sizes = [len(values) for values in FACTORS.values()]
    assert len(seen) == sum(a * b for a, b in itertools.combinations(sizes, 2))


def model_of(norm: str, row: dict[str, Any]) -> Any:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[row["dim"] - 1]
    options = {"track_running_stats": row["tracks"]} if norm in OPTIONAL else {}
    built = normswap.build(norm, CHANNELS, dim=row["dim"], **options)
    model = filled(nn.Sequential(conv(3, CHANNELS, 1), built))
    if norm != "identity":
        if row["affine"] != "both":
            model[1].register_parameter("bias", None)
        if row["affine"] == "none":
            model[1].register_parameter("weight", None)
    for parameter in model[1].parameters():
        parameter.requires_grad_(row["trainable"] and norm != "frozen_bn")
    return model.to(row["dtype"]).train(row["training"])


def run(model: nn.Module, row: dict[str, Any], *, train: bool) -> Tensor:
    x = numbers(4, 3, *(5, 4, 3)[: row["dim"]]).to(row["dtype"])
    torch.default_generator.manual_seed(0)  # some draw in training
    with torch.no_grad(), normswap.preserve_stats(model):
        return model.train(train)(x).double()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rows_of(source: str, target: str) -> list[dict[str, Any]]:
    """All rows where one of each kind is met; of the other pairs each takes another third."""
    third = (NORMS.index(source) + NORMS.index(target)) % 3
    return ROWS if meeting(source, target) else ROWS[third::3]


@pytest.mark.parametrize("target", NORMS)
@pytest.mark.parametrize("source", NORMS)
def test_every_pair_keeps_its_promises(source: str, target: str) -> None:
    for row in rows_of(source, target):
        model = model_of(source, row)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        parameters, old = dict(model.named_parameters()), model[1]
        flags = {name: p.requires_grad for name, p in parameters.items()}
        evaluated = run(model, row, train=False)
        trained = run(model, row, train=True)
        model.train(row["training"])
        try:
            (step,) = normswap.plan(model, target, where="*").of("convert", "already")
        except NothingToConvert:
            assert target == "frozen_bn"
            assert source not in TRACKING or (source in OPTIONAL and not row["tracks"])
            continue
        normswap.convert(model, target, where="*")

        new = model[1]
        assert new.training is row["training"], row
        assert step.action == "convert" or new is old
        assert {t.dtype for t in model.state_dict().values()} <= {row["dtype"], torch.long}, row
        if hasattr(old, "eps") and hasattr(new, "eps"):
            assert new.eps == old.eps, row
        for name in ("weight", "bias"):
            own = parameters.get(f"1.{name}")
            if own is not None and target != "identity":
                assert getattr(new, name) is own, (name, row)
                if target != "frozen_bn" and source != "frozen_bn":
                    assert own.requires_grad is flags[f"1.{name}"], (name, row)

        slack = SLACK[row["dtype"]]
        if step.fidelity in ("exact", "eval"):
            assert far(run(model, row, train=False), evaluated) <= slack, row
        if step.fidelity == "exact":
            assert far(run(model, row, train=True), trained) <= slack, row
        assert run(model, row, train=True).isfinite().all(), row

        normswap.revert(model.train(row["training"]))
        assert model[1] is old, row
        after = model.state_dict()
        assert list(after) == list(before), row
        assert all(torch.equal(after[key], value) for key, value in before.items()), row
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags, row
