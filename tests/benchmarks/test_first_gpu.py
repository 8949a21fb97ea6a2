"""The first measurement on a GPU, as far as it goes without servers; `--dry-run` is the rehearsal with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.serving import first_gpu
from benchmarks.serving.stages import Clock, Log, put_vllm_on_path
from vlmq_serve.bench.variants import Load

pytestmark = pytest.mark.unit


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start to measure on the GPU")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["first_gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--dry-run rehearses"):
        first_gpu.main()
    assert not (tmp_path / "out").exists()


def test_a_failure_is_written_down_and_passed_over(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.txt", Clock(10))
    with log.failure("w3"):
        raise ValueError("no memory")
    with log.failure("w2"):
        log("w2: ready")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("w3: failed: ValueError: no memory")
    assert second.endswith("w2: ready")
    assert 9 < log.clock.left() <= 10


def test_a_vllm_command_is_made_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that were unpacked have modules but no scripts; here the module is one that prints its arguments."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    interpreter = sys.executable
    monkeypatch.setattr("sys.executable", f"{tmp_path}/python")
    (tmp_path / "python").symlink_to(interpreter)
    put_vllm_on_path()
    told = subprocess.run(["vllm", "serve", "x"], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert told.stdout.strip() == "['serve', 'x']"


def test_every_load_can_be_read() -> None:
    assert [Load.parse(text).name for text in (*first_gpu.GPU_LOADS, *first_gpu.CPU_LOADS)]
