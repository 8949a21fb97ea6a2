"""Imports run one way: format <- kernels <- quant_methods <- plugin, format <- calibrate <- cli, evaluate <- cli."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vlmq_serve"

# What a part of the package may import of its siblings, and of the world where that is restricted.
SIBLINGS = {
    "__init__": set(),
    "device": set(),
    "format": set(),
    "kernels": {"format", "device"},
    "quant_methods": {"format", "kernels"},
    "plugin": {"quant_methods"},
    "calibrate": {"format"},
    "evaluate": {"format", "device", "calibrate"},  # the data file and its chats are read by one piece of code
    "verify": {"format", "kernels", "quant_methods"},
    "export": {"format"},
    "bench": {"format", "device", "evaluate"},
    "cli": {"format", "device", "calibrate", "evaluate", "kernels", "quant_methods", "verify", "bench", "export"},
}
FORBIDDEN = {
    "format": {"vllm", "transformers", "triton"},
    "kernels": {"vllm", "transformers"},
    "quant_methods": {"transformers", "triton"},
    "calibrate": {"vllm", "triton"},
    "evaluate": {"triton"},
}
FORMAT_MAY = {"torch", "safetensors", "vlmq_serve"} | set(sys.stdlib_module_names)

pytestmark = pytest.mark.unit


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "vlmq_serve" else (module,)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_a_rule() -> None:
    assert {part_of(path) for path in FILES} <= set(SIBLINGS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    for module in imported_modules(path):
        top, *rest = module.split(".")
        assert top not in FORBIDDEN.get(part, set()), f"{part} must not import {module}"
        if part == "format":
            assert top in FORMAT_MAY, f"format may import torch, safetensors and the standard library, not {module}"
        if top == "vlmq_serve" and rest and rest[0] != "__version__":
            assert rest[0] in SIBLINGS[part] | {part}, f"{part} must not import {module}"


def test_the_rule_notices_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from vllm.config import VllmConfig\n    from vlmq_serve import kernels\n")
    assert set(imported_modules(wrong)) == {"vllm.config", "vlmq_serve.kernels"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("vlmq_serve", ["torch", "vllm", "triton", "transformers"]),
        ("vlmq_serve.plugin", ["torch", "vllm", "triton", "transformers"]),
        ("vlmq_serve.quant_methods", ["torch", "vllm", "triton", "transformers"]),
        ("vlmq_serve.format", ["vllm", "triton", "transformers"]),
        ("vlmq_serve.kernels", ["vllm", "triton", "transformers"]),
    ],
)
def test_importing_stays_light(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
