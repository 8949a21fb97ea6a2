"""`vlmq bench quality` on the shipped model with a handful of chats: real calibrations, real answers."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vlmq_serve.cli import app
from vlmq_serve.evaluate.quality import measure

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"


def bench(tmp_path: Path, *arguments: str) -> Result:
    given = [str(ROOT / "examples" / "tiny-qwen2vl"), "--data", str(DATA / "calibration.jsonl")]
    given += ["--questions", str(DATA / "evaluation.jsonl"), "-o", str(tmp_path / "table"), "--scheme", "w2g64"]
    given += ["--samples", "8", "--limit", "16", "--divergence-chats", "8", "--work", str(tmp_path / "work")]
    return CliRunner().invoke(app, ["bench", "quality", *given, *arguments], env={"COLUMNS": "200"})


def test_an_output_that_cannot_be_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "table.md").mkdir()
    for output, message in {
        tmp_path / "file" / "table": "file: File exists",
        tmp_path: f"--output {tmp_path}: is a folder",
        tmp_path / "table": "table.md: cannot be written",
    }.items():
        result = bench(tmp_path, "-o", str(output))
        assert result.exit_code == 1
        assert message in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    missing = bench(tmp_path, "-o", str(tmp_path / "other"))
    assert "--output: matplotlib is not installed; pip install" in missing.stderr
    assert not (tmp_path / "work").exists()


def test_a_table_and_a_second_run_that_keeps_what_is_done(tmp_path: Path) -> None:
    first = bench(tmp_path, "--method", "gptq")
    assert first.exit_code == 0, first.output
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert len(kept) == 2
    second = bench(tmp_path, "--method", "gptq", "--method", "rtn")
    assert second.exit_code == 0, second.output
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(list((tmp_path / "work").iterdir())) == 3
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 9
    assert {line.split(",")[0] for line in lines[1:]} == {"bf16", "gptq", "rtn"}
    whole = {line.split(",")[0]: line.split(",") for line in lines if ",all," in line}
    assert float(whole["bf16"][9]) == float(whole["bf16"][10]) == 0
    assert float(whole["rtn"][10]) > float(whole["gptq"][10]) > 0  # KL on answers: rounding is far off at 2 bits
    assert float(whole["gptq"][12]) > 100  # MiB
    assert (tmp_path / "table.png").exists()


def test_dtypes_are_kept_apart_and_named(tmp_path: Path) -> None:
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        result = bench(tmp_path, "--method", "rtn", "--device", "cpu", "--dtype", dtype)
        assert result.exit_code == 0, result.output
        assert f"greedy answers in {name} on cpu" in (tmp_path / "table.md").read_text()
    kept = [json.loads(path.read_text()) for path in (tmp_path / "work").glob("rtn*.json")]
    assert sorted(record["dtype"] for record in kept) == ["bfloat16", "float32"]
    first, second = (record["divergence"]["prompt"] for record in kept)
    assert first != second
    assert first == pytest.approx(second, rel=0.1)


def test_no_two_models_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def counted(load: Any) -> Any:
        def run(*arguments: Any) -> Any:
            assert all(model() is None for model in loaded)
            model = load(*arguments)
            loaded.append(weakref.ref(model))
            return model

        return run

    for name in ("load_model", "load_simulated"):
        monkeypatch.setattr(measure, name, counted(getattr(measure, name)))
    gc.disable()  # what is freed must be freed by the command
    try:
        result = bench(tmp_path, "--method", "rtn", "--scheme", "w4g64")
    finally:
        gc.enable()
    assert result.exit_code == 0, result.output
    assert len(loaded) == 4  # the source for its answers, again for its predictions, and two variants


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptq:samples"), "expected METHOD:key=value"),
        (("--scheme", "w5g64"), "bits: got 5"),
        (("--scheme", "w2g128"), "does not divide"),
        (("--method", "rtn", "--baseline", "gptaq"), "which is none of the methods; add --method gptaq"),
        (("--samples", "512", "--seed", "0", "--seed", "1"), "draw the same 512 of the 512 chats"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = bench(tmp_path, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_killed_command_leaves_no_calibration_behind(tmp_path: Path) -> None:
    """It would go on into the folder that the next run of the same command makes anew."""
    with running(tmp_path) as (command, calibration):
        command.kill()
        command.wait()
        assert wait_until(lambda: not Path(f"/proc/{calibration}").exists())


def test_a_calibration_that_is_killed_is_one_error(tmp_path: Path) -> None:
    with running(tmp_path) as (command, calibration):
        os.kill(calibration, signal.SIGKILL)
        output, _ = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "error: gptq-w2g64-seed0: the process of its calibration was killed" in output
    assert "Traceback" not in output


@contextlib.contextmanager
def running(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The command in a process of its own, and the id of the process that calibrates; both are gone afterwards."""
    arguments = [str(ROOT / "examples" / "tiny-qwen2vl"), "--data", str(DATA / "calibration.jsonl"), "--questions"]
    arguments += [str(DATA / "evaluation.jsonl"), "-o", str(tmp_path / "table"), "--scheme", "w2g64", "--limit", "2"]
    arguments += ["--method", "gptq", "--divergence-chats", "1", "--work", str(tmp_path / "work")]
    script = "from vlmq_serve.cli import app; app()"
    command = subprocess.Popen(
        [sys.executable, "-c", script, "bench", "quality", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert wait_until(lambda: any((tmp_path / "work").glob("gptq*.partial")))
        (calibration,) = (
            int(status.parent.name)
            for status in Path("/proc").glob("[0-9]*/status")
            if (text := read(status)) and f"PPid:\t{command.pid}\n" in text and spawned(status.parent)
        )
        yield command, calibration
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.wait()


def read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def spawned(process: Path) -> bool:
    return "spawn_main" in read(process / "cmdline")


def wait_until(done: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()
