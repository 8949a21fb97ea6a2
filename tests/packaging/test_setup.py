"""The set-up script: which vLLM it chooses, what it refuses, and that its stand-ins are real distributions."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "setup_env.py"

pytestmark = pytest.mark.unit


def dry_run(folder: Path, nvidia_smi: str | None) -> str:
    """Output of the plan on a machine whose nvidia-smi is the given shell script."""
    if nvidia_smi is not None:
        command = folder / "nvidia-smi"
        command.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize(
    ("nvidia_smi", "kind"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3'", "cuda"),
        ("echo 'no devices were found'", "cpu"),
        ("echo 'driver is not loaded' >&2; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_machine_decides_which_vllm(tmp_path: Path, nvidia_smi: str | None, kind: str) -> None:
    output = dry_run(tmp_path, nvidia_smi)
    assert f"kind: {kind}" in output
    assert f"[{kind},eval,bench,peers,dev]" in output


@pytest.fixture(scope="module")
def standins():
    sys.path.insert(0, str(SCRIPT.parent))
    import standins

    yield standins
    sys.path.remove(str(SCRIPT.parent))


def test_stand_ins_install_and_have_the_versions_that_vllm_looks_for(standins, tmp_path: Path) -> None:
    chosen = [*standins.AUDIO_AND_VIDEO, standins.command_standin("0.32.0"), standins.VISION_OPS]
    wheels = [str(standins.build_wheel(standin, tmp_path)) for standin in chosen]
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), *wheels],
        check=True,
        timeout=120,
    )
    versions = {found.metadata["Name"]: found.version for found in distributions(path=[str(target)])}
    assert versions == {standin.name: standin.version for standin in chosen}
    assert "cpu" in versions["vllm"]
    assert [path.name for path in target.glob("*.py")] == ["vlmq_torchvision_ops.py"]


def test_the_environment_has_no_module_that_cannot_be_imported() -> None:
    code = (
        "import importlib.util as u, importlib.metadata as m, torch, torchvision\n"
        "from transformers import Qwen2VLVideoProcessor\n"
        "Qwen2VLVideoProcessor()\n"
        "cpu = torch.version.cuda is None\n"
        "assert not cpu or (u.find_spec('torchaudio') is None and u.find_spec('torchcodec') is None)\n"
        "m.version('vllm')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
