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
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
