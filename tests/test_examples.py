"""The examples run as their docstrings say, and show what they are to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(printed: str, *first: str) -> list[list[str]]:
    """The rest of every row whose first cells are these."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines())
    return [row[len(first) :] for row in rows if tuple(row[: len(first)]) == first]


def percent(cell: str) -> float:
    return float(cell.removesuffix("%"))


def test_your_own_norm_keeps_what_the_net_has_learnt() -> None:
    printed = run(str(EXAMPLES / "your_own_norm.py"))
    accuracies = re.findall(r"([\d.]+)%", printed)
    assert len(accuracies) == 4
    assert len(set(accuracies)) == 1
    assert float(accuracies[0]) > 90


def test_two_ranks_of_uneven_batches_train_as_one_process() -> None:
    printed = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / "ddp_on_cpu.py"),
    )  # fmt: skip
    (difference,) = re.findall(r"weights and statistics: (\S+)", printed)
    assert float(difference) < 1e-9


def test_a_warmup_before_training_helps_fixed_statistics_and_changes_no_weight_else() -> None:
    printed = run(str(EXAMPLES / "warmup_before_training.py"), "--quick")
    for learning_rate in ("0.001", "0.003"):
        ((start, *cold), (after, *warm)) = cells(printed, "fixed", learning_rate)
        assert (start, after) == ("mean 0, variance 1", "after warmup")
        assert percent(warm[-1]) > percent(cold[-1]) + 2
    assert "equal to the last bit" in printed
    normal = cells(printed, "each batch's own", "0.001")
    assert normal[0][-1] == normal[1][-1]


def test_one_pass_mends_stale_statistics_and_is_exact_on_a_short_last_batch() -> None:
    printed = run(str(EXAMPLES / "stale_statistics.py"), "--quick")
    for weights in ("as trained", "EMA", "SWA"):
        rows = [cells(printed, momentum, weights) for momentum in ("0.1", "0.03", "0.01")]
        assert len({after for ((_, after),) in rows}) == 1
        ((before, after),) = rows[-1]
        assert percent(after) > 95 > percent(before) + 20
    for images in ("mixed", "sorted by ink"):
        ((of_mean, of_var, _),) = cells(printed, images, "normswap.warmup")
        assert max(float(of_mean), float(of_var)) < 1e-6
        ((of_mean, of_var, _),) = cells(printed, images, "torch's update_bn")
        assert min(float(of_mean), float(of_var)) > 1e-3


def test_groupnorm_learns_where_a_batch_is_two_values_a_channel() -> None:
    printed = run(str(EXAMPLES / "small_batch_groupnorm.py"), "--quick")
    ((batch_norm, warmed, _, group_norm),) = cells(printed, "1 × 1", "2")
    assert percent(group_norm) > max(percent(batch_norm), percent(warmed)) + 3
    for case in (("1 × 1", "8"), ("2 × 2", "2")):
        ((batch_norm, _, _, group_norm),) = cells(printed, *case)
        assert min(percent(batch_norm), percent(group_norm)) > 93


def test_ranks_with_uneven_shards_warm_up_as_one_process() -> None:
    printed = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / "warmup_distributed.py"),
    )  # fmt: skip
    for method in ("pooled", "population"):
        ((difference,),) = cells(printed, method)
        assert float(difference) < 1e-10
    assert "equal to the last bit" in printed


def test_statistics_of_each_domain_help_the_harder_one() -> None:
    printed = run(str(EXAMPLES / "domain_specific_bn.py"), "--quick")
    ((_, mixed),) = cells(printed, "BatchNorm")
    ((_, told),) = cells(printed, "dsbn, by domain")
    ((_, found),) = cells(printed, "dsbn, by cluster")
    assert min(percent(told), percent(found)) > percent(mixed)


def test_a_photograph_takes_on_the_colours_of_another(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "style.png"
    printed = run(str(EXAMPLES / "style_adain.py"), "--out", str(out))
    assert cells(printed, "china as china") == [["1.00", "0.000", "0.000"]]
    for pair in ("china as flower", "flower as china"):
        ((shapes, before, now),) = cells(printed, pair)
        assert float(shapes) > 0.8
        assert float(now) < 0.1 * float(before)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_label_map_at_every_norm_paints_better(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "spade.png"
    printed = run(str(EXAMPLES / "spade_label_map.py"), "--quick", "--out", str(out))
    ((batch_norm,),) = cells(printed, "BatchNorm")
    ((spade,),) = cells(printed, "SPADE")
    assert float(spade) < 0.8 * float(batch_norm)
    assert out.read_bytes().startswith(b"\x89PNG")
