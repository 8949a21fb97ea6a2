"""How the C++ kernels are compiled, kept and found again."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.weights import exact_weight, random_weight, relative_error
from vlmq_serve.kernels import linear, native, native_build, native_cache, prepare

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or a CPU without AVX2"),
]
BF16, FP32 = torch.bfloat16, torch.float32

BROKEN = "echo broken >&2; exit 1"
NO_OPENMP = 'case "$*" in *--version) echo 1;; *) echo -fopenmp is not supported >&2; exit 1;; esac'
EMPTY = "exit 0"  # says that all went well, and writes nothing that can be loaded


def only(folder: Path, compilers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """These programs, each a line of shell, are all the compilers that there are."""
    for name, script in compilers.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setattr(shutil, "which", partial(shutil.which, path=str(folder)))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize("reason", ["none", "fails"])
def test_without_a_working_compiler(
    reason: str,
    fresh: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The older paths serve, with one message that says why; nothing half-built is left."""
    only(
        tmp_path_factory.mktemp("bin"), {"g++": BROKEN, "clang++": NO_OPENMP} if reason == "fails" else {}, monkeypatch
    )
    with caplog.at_level(logging.WARNING, logger="vlmq_serve.kernels.native"):
        for bits, dtype in ((4, BF16), (3, FP32), (8, BF16)):
            weight = random_weight(64, 128, bits, 64, False)
            prepared = prepare(weight, dtype, "cpu")
            assert prepared.path != "cpu_int16"
            x = torch.randn(4, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
            assert relative_error(linear(x, prepared), x.double() @ exact_weight(weight).T) <= 1e-2
    assert len(caplog.records) == 1
    expected = ["no C++ compiler"] if reason == "none" else ["g++: broken", "clang++: -fopenmp is not supported"]
    assert all(text in caplog.text for text in [*expected, "slower"])
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("broken", [BROKEN, NO_OPENMP, EMPTY])
def test_the_next_compiler_is_tried(
    broken: str,
    fresh: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One message names the compiler that failed; the next process finds what the other one compiled."""
    folder = tmp_path_factory.mktemp("bin")
    only(folder, {"first": broken, "g++": f'exec {shutil.which("g++") or shutil.which("c++")} "$@"'}, monkeypatch)
    monkeypatch.setenv("CXX", "first -v")
    assert native.library() is not None
    assert len(caplog.records) == 1
    assert f"{folder / 'first'} -v: " in caplog.text
    assert "another compiler's serve" in caplog.text
    before = set(fresh.iterdir())
    native.library.cache_clear()
    assert native.library() is not None
    assert set(fresh.iterdir()) == before


def test_a_compiler_that_takes_too_long(
    fresh: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, with what it had said, and the next one is asked."""
    slow = 'case "$*" in *--version) echo 1;; *) echo a warning >&2; exec sleep 9;; esac'
    only(tmp_path_factory.mktemp("bin"), {"g++": slow, "clang++": BROKEN}, monkeypatch)
    monkeypatch.setattr(native_build, "TIMEOUT_S", 1)
    loaded, (first, second) = native_build.load("slow", "integer.cpp", ())
    assert loaded is None
    assert first.endswith("g++: a warning\n\nnot done after 1 s")
    assert second.endswith("clang++: broken")
    assert list(fresh.iterdir()) == []


def test_processes_that_build_at_once(fresh: Path) -> None:
    code = (
        "import torch\n"
        "from tests.kernels.weights import random_weight\n"
        "from vlmq_serve.kernels import prepare\n"
        "assert prepare(random_weight(32, 64, 4, 32, False), torch.float32, 'cpu').path == 'cpu_int16'\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", ""))),
        native_cache.CACHE_ENVIRONMENT: str(fresh),
    }
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert sorted(path.name.split("-")[0] for path in fresh.iterdir()) == ["integer", "operator"]


def test_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(fresh / "file" / "below"))
    assert native.library() is not None


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory."""
    command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "none", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a disk, which only root may")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 64 KiB, which is less than the kernels take."""
    with mounted(tmp_path_factory.mktemp("disk"), "size=64k") as folder:
        yield folder


@pytest.fixture
def noexec_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk from which nothing can be run, as /tmp of many a container."""
    with mounted(tmp_path_factory.mktemp("disk"), "noexec") as folder:
        yield folder


def test_a_full_disk(
    small_disk: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernels are compiled elsewhere, for this process."""
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(small_disk))
    assert native.library() is not None
    (record,) = caplog.records
    assert f"the disk of {small_disk} is full; free some space, or set VLMQ_CACHE" in record.getMessage()
    assert list(small_disk.iterdir()) == []


def test_full_disks_everywhere(
    small_disk: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One message for each folder, and none that blames the compilers."""
    cache, temporary = small_disk / "cache", small_disk / "temporary"
    temporary.mkdir(mode=0o700)
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(cache))
    monkeypatch.setattr(native_cache, "_temporary_folder", lambda: SimpleNamespace(name=str(temporary)))
    assert native.library() is None
    first, second = (record.getMessage() for record in caplog.records)
    assert f"the disk of {cache} is full" in first
    assert f"slower kernels serve\nthe disk of {temporary} is full; free some space, or set VLMQ_CACHE" in second
    assert "g++" not in second


def test_a_cache_from_which_nothing_can_be_run(
    noexec_disk: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernels are compiled elsewhere, for this process."""
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(noexec_disk))
    assert native.library() is not None
    (record,) = caplog.records
    assert f"the disk of {noexec_disk} cannot be run (it is mounted noexec); set VLMQ_CACHE" in record.getMessage()
    assert list(noexec_disk.iterdir()) == []


@pytest.mark.parametrize("fault", ["noexec", "none"])
def test_no_temporary_folder_that_can_be_used(
    fault: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: Any
) -> None:
    """One message for each folder, and none that blames the compilers."""
    temporary = request.getfixturevalue("noexec_disk") if fault == "noexec" else "/proc/nowhere"
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, f"/proc/{fault}")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(native_cache, "_temporary_folder", native_cache._temporary_folder.__wrapped__)
    assert native.library() is None
    first, second = (record.getMessage() for record in caplog.records)
    assert f"not kept in /proc/{fault}" in first
    reason = "no temporary folder can be made (No such file or directory)"
    if fault == "noexec":
        reason = f"what lies on the disk of {temporary}"
    assert f"slower kernels serve\n{reason}" in second
    assert "set VLMQ_CACHE to a folder" in second
    assert "g++" not in second


def test_compiler_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    command = native_build._compilers()[0]
    assert Path(command[0]).name == "env"
    assert command[1:] == ("LC_ALL=C", "g++")
