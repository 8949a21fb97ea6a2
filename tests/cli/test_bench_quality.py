"""`vlmq bench quality` on the shipped model with a handful of chats: real calibrations, real answers."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlmq_serve.cli import app

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"


def bench(tmp_path: Path, *arguments: str) -> Result:
    given = [str(ROOT / "examples" / "tiny-qwen2vl"), "--data", str(DATA / "calibration.jsonl")]
    given += ["--questions", str(DATA / "evaluation.jsonl"), "-o", str(tmp_path / "table"), "--scheme", "w2g64"]
    given += ["--samples", "8", "--limit", "16", "--divergence-chats", "8", "--work", str(tmp_path / "work")]
    return CliRunner().invoke(app, ["bench", "quality", *given, *arguments], env={"COLUMNS": "200"})


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
