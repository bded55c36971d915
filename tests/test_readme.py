"""The README says what is so: its tour runs, and its table of norms is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import normswap

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_tour_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    (tour,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(tour, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "layer1.0.bn1" in printed
    assert "frozen_bn" in printed
    assert not normswap.report(names["model"])


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"^[A-Z]{4,}$", README, re.MULTILINE)


def test_the_drawings_are_what_the_layers_tell() -> None:
    (drawn,) = re.findall(r"`normswap draw` prints .*?```text\n(.*?)\n```", README, re.DOTALL)
    assert drawn == normswap.draw_text()


def test_the_table_of_norms_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    table = [row for row in rows if row[0] in {norm.name for norm in normswap.list_norms()}]
    assert table == [
        (norm.name, norm.pooled, ", ".join(sorted(norm.sources))) for norm in normswap.list_norms()
    ]
