import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text
from typer.testing import CliRunner

import normswap
from normswap import cli

HELP_THEN_LIST_MODULES = """
import sys
import normswap, normswap.cli
sys.argv = ["normswap", "--help"]
try:
    normswap.cli.main()
except SystemExit as leave:
    print("code", leave.code)
print("heavy", sorted({"torch", "numpy", "timm", "sklearn", "matplotlib"} & set(sys.modules)))
"""


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["normswap", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_help_loads_nothing_heavy() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HELP_THEN_LIST_MODULES], capture_output=True, text=True, check=True
    )
    assert "demo" in ran.stdout
    assert "norms" in ran.stdout
    assert "code 0" in ran.stdout
    assert "heavy []" in ran.stdout
    assert ran.stderr == ""


def test_demo_help_names_every_option_and_its_default() -> None:
    ran = CliRunner().invoke(cli.app, ["demo", "--help"], env={"COLUMNS": "120"})
    assert ran.exit_code == 0
    shown = Text.from_ansi(ran.stdout).plain
    for text in ("--out", "demo.png", "--epochs", "3, or 2 if quick", "--seed", "--quick"):
        assert text in shown


def test_norms_lists_them_all() -> None:
    ran = CliRunner().invoke(cli.app, ["norms"])
    assert ran.exit_code == 0
    first_words = {line.split()[0] for line in ran.stdout.splitlines() if line.strip()}
    assert {"bn", "sync_bn", "frozen_bn", "gn", "in", "ln", "identity"} <= first_words


def test_draw_prints_drawings_of_the_norms_that_are_named() -> None:
    ran = CliRunner().invoke(cli.app, ["draw", "gn", "ln"])
    assert ran.exit_code == 0
    assert ran.stdout == normswap.draw_text("gn", "ln") + "\n"
    ran = CliRunner().invoke(cli.app, ["draw", "bn", "--eval"])
    assert ran.stdout == normswap.draw_text("bn", training=False) + "\n"


def test_draw_makes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "norms.png"
    ran = CliRunner().invoke(cli.app, ["draw", "gn", "in", "--out", str(target)])
    assert ran.exit_code == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert str(target) in ran.stdout


def test_an_unknown_norm_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "draw", "nonesuch") == 1
    assert "nonesuch" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "draw"])
@pytest.mark.parametrize(
    ("out", "complaint"),
    [("demo.gif", "ends in .png"), ("no/such/folder/demo.png", "missing or not writable")],
)
def test_a_place_where_no_picture_can_go_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    out: str,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, command, "--out", out) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("normswap: --out=")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "name"),
    [("timm", "timm"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")],
)
def test_a_missing_library_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    module: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run_main(monkeypatch, "demo", "--quick", "--out", str(tmp_path / "demo.png")) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"needs {name}" in printed.err or f", {name}" in printed.err
    assert 'pip install "normswap[demo]"' in printed.err
    assert printed.err.count("\n") == 1


def test_an_unknown_command_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err
