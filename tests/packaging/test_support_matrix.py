"""The script that writes docs/support.md from what the tests reported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.unit


def run(script: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_without_arguments_nothing_is_written(tmp_path: Path) -> None:
    """It took its own file for the target."""
    script = Path(shutil.copy(ROOT / "scripts" / "support_matrix.py", tmp_path))
    before = script.read_text()
    assert run(script).returncode == 2
    assert run(script, tmp_path / "support.md").returncode == 2
    assert script.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [script.name]


def test_a_case_counts_as_the_last_report_has_it(tmp_path: Path) -> None:
    case = '<testcase classname="tests.packaging.test_support_matrix" name="test_x[a]">{}</testcase>'
    for name, outcome in {"first": "<failure/>", "second": ""}.items():
        (tmp_path / name).write_text(f"<testsuite>{case.format(outcome)}</testsuite>")
    done = run(ROOT / "scripts" / "support_matrix.py", tmp_path / "first", tmp_path / "second", tmp_path / "support.md")
    assert done.returncode == 0, done.stderr
    assert "| x | a | 1 passed |" in (tmp_path / "support.md").read_text()
