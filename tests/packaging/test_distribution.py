"""What `pip` installs: one importable package, its command, its vLLM entry point, and honest requirements."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
# Imported inside functions that first say which extra is missing, or chosen by the extras `cpu` and `cuda`.
OPTIONAL = {"vllm", "triton", "openai", "psutil", "matplotlib", "gemlite", "auto_round_kernel"}

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "tree"
    copy = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60)
    for name in filter(None, copy.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)],
        cwd=source,
        check=True,
        timeout=300,
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_one_importable_package(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vlmq_serve"}


def test_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    listed = subprocess.run(["git", "ls-files", "vlmq_serve"], cwd=ROOT, capture_output=True, text=True, check=True)
    present = {name for name in listed.stdout.split() if (ROOT / name).is_file()}
    assert present <= set(wheel.namelist())


def test_wheel_does_not_require_vllm(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    hard = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert hard
    assert not any("vllm" in line for line in hard)
    assert "License-Expression: Apache-2.0" in metadata


def test_entry_points_are_installed() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="vlmq")
    assert plugin.value == "vlmq_serve.plugin:register"
    assert callable(plugin.load())
    (command,) = entry_points(group="console_scripts", name="vlmq")
    assert command.value == "vlmq_serve.cli:app"


def test_requirements_are_what_the_code_imports() -> None:
    declared = {re.split(r"[<>=!\[; ]", requirement)[0].lower() for requirement in PROJECT["dependencies"]}
    names = {IMPORT_NAMES.get(name, name) for name in declared}
    imported = set()
    for path in (ROOT / "vlmq_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"vlmq_serve", ""}
    assert foreign - names - OPTIONAL == set(), "imported but not declared in pyproject.toml"
    assert names - foreign == set(), "declared in pyproject.toml but never imported"
