"""Data flows one way: what a folder may import, and where each norm lies."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import normswap
from normswap.norms.entry import NormEntry

ROOT = Path(normswap.__file__).parent

#: Each may import those before it.
FOLDERS = ("norms", "graph", "swap", "stats", "views", "integrations")
AXES = ("statistics", "standardization", "affine")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The parts below ``normswap`` of every module that a file imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "normswap":
                yield tuple(parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_none_that_comes_after_it(folder: str) -> None:
    later = set(FOLDERS[FOLDERS.index(folder) + 1 :])
    found = [
        (path.relative_to(ROOT), *parts)
        for path in (ROOT / folder).rglob("*.py")
        for parts in imports(path)
        if parts[0] in later
    ]
    assert not found


def test_norms_build_on_what_they_share_and_on_axes_before_theirs() -> None:
    for path in (ROOT / "norms").rglob("*.py"):
        axis = path.parent.name
        before = AXES[: AXES.index(axis) + 1] if axis in AXES else ()
        if path.name == "registry.py":
            continue  # it alone knows them all
        for parts in imports(path):
            if parts[0] == "norms" and parts[1] in AXES:
                assert parts[1] in before, (path.relative_to(ROOT), parts)


@pytest.mark.parametrize("entry", normswap.list_norms(), ids=lambda entry: entry.name)
def test_a_norm_lies_where_the_survey_sorts_it(entry: NormEntry) -> None:
    files = {Path(inspect.getsourcefile(cls) or "") for cls in entry.reads}
    ours = {file.parent.name for file in files if ROOT in file.parents}
    expected = {"bn": "statistics", "identity": "norms", "fold": "norms"}
    assert ours == {expected.get(entry.name, entry.axis)}


@pytest.mark.parametrize("name", normswap.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(normswap, name) is not None
