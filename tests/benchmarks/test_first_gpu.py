"""The first measurement on a GPU, as far as it goes without servers; `--dry-run` is the rehearsal with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.first_gpu import Stage, run
from benchmarks.serving import first_gpu
from benchmarks.serving.stages import Clock, Log, put_nvrtc_on_path, put_vllm_on_path
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


def test_the_servers_get_arguments_that_vllm_knows() -> None:
    """All of them, of every attempt; a wrong one would cost every variant its start."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for extra in first_gpu.ATTEMPTS:
        backend = "--linear-backend=humming"
        given = parser.parse_args(["--model", "m", *first_gpu.GPU_ARGUMENTS, *extra, backend, "--dtype", "bfloat16"])
        assert given.max_num_batched_tokens >= given.max_num_seqs


@pytest.mark.parametrize(("status", "peers", "tries"), [(3, True, 2), (0, True, 1), (3, False, 1)])
def test_kernels_of_others_are_left_out_after_a_crash(status: int, peers: bool, tries: int, tmp_path: Path) -> None:
    """A process whose GPU is in an error measures nothing more, ours neither."""
    code = f"import sys; print(sys.argv[1:]); sys.exit(0 if sys.argv[-1] == 'none' else {status})"
    stage = Stage("bench", 60, ((sys.executable, "-c", code, "--rows", "1"),), peers=peers)
    good = run(stage, tmp_path, Log(tmp_path / "log.txt", Clock(60)), rehearse=False)
    assert good == (status == 0 or tries == 2)
    seen = (tmp_path / "bench-0.txt").read_text().splitlines()
    assert seen == ["['--rows', '1']", "['--rows', '1', '--peers', 'none']"][:tries]


def test_child_processes_find_the_compiler_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc-builtins.so.13.0").touch()
    monkeypatch.setattr("torch.__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")
    put_nvrtc_on_path()
    assert os.environ["LD_LIBRARY_PATH"] == f"/usr/local/nvidia/lib64:{folder}"
