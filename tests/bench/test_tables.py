"""Variants and loads of the serving benchmark, its tables and plots, and that finished parts are not measured again."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmq_serve.bench.serving import ServerFacts, bench_command, run_variant
from vlmq_serve.bench.tables import markdown, ratio_table, read_rows
from vlmq_serve.bench.variants import FULL, QUICK, Load, Variant
from vlmq_serve.cli import app
from vlmq_serve.evaluate.server import Server
from vlmq_serve.format.errors import VLMQError

pytestmark = pytest.mark.unit
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"


def measured(out: Path, name: str, speed: float, worker: float) -> None:
    """A finished variant, as a run leaves it."""
    folder = out / name
    folder.mkdir(parents=True)
    facts = ServerFacts(name, "auto", 100 * worker, 40.0, 4096, 2 * worker, worker, 3 * worker, 0.0, 0.0)
    (folder / "server.json").write_text(json.dumps(asdict(facts)))
    for load in QUICK:
        result = {"median_ttft_ms": 10 / speed, "median_tpot_ms": 5 / speed, "output_throughput": 20 * speed}
        (folder / f"{load.name}.json").write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, speed, worker in (("bf16", 1.0, 1000.0), ("w3", 2.0, 700.0), ("floor", 9.0, 500.0)):
        measured(tmp_path, name, speed, worker)
    return tmp_path


def test_ratios_are_to_the_first_variant_without_the_floor(results: Path) -> None:
    rows = read_rows(results, ["bf16", "w3", "floor"])
    header, *lines = ratio_table(rows, "bf16", ["TPOT ms", "output tokens/s", "weights_mib", "ITL ms"])
    assert header == ["variant", "load", "TPOT ms", "output tokens/s", "weights_mib", "ITL ms"]
    assert {line[0] for line in lines} == {"bf16", "w3"}
    assert ["bf16", "c1-p32-o32-i0", "5", "20", "500", "-"] in lines
    assert ["w3", "c1-p32-o32-i0", "x0.50", "x2.00", "x0.40", "-"] in lines
    assert markdown([header, *lines]).startswith("| variant | load |")


def test_a_finished_run_is_not_repeated_and_its_tables_are_written(results: Path) -> None:
    """No server is started: it would need vLLM and a minute."""
    variants = [f"{name}={MODEL}" for name in ("bf16", "w3", "floor")]
    done = CliRunner().invoke(app, ["bench", "serve", *variants, "-o", str(results), "--quick"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    with (results / "serve.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 3 * len(QUICK)
    assert all(row["device"] for row in rows)
    assert (results / "memory.png").stat().st_size > 1000
    assert (results / "throughput-latency.png").stat().st_size > 1000
    assert not list(results.glob("*/serve.log"))


def test_memory_has_one_row_per_variant(results: Path) -> None:
    rows = read_rows(results, ["bf16", "w3"], timings=False)
    assert [(row.variant, row.load) for row in rows] == [("bf16", ""), ("w3", "")]
    assert "TPOT ms" not in rows[0].values


def test_a_variant_with_a_missing_load_is_started(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results / "w3" / f"{QUICK[1].name}.json").unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(results / "python"))
    with pytest.raises(VLMQError, match="vllm: command not found"):
        run_variant(Variant("w3", MODEL), QUICK, results, (), lambda _: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("w4", "expected NAME=FOLDER"), ("w4=/nowhere", "not a model folder"), (f"w4={MODEL}@int8", "got dtype 'int8'")],
)
def test_a_wrong_variant_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        Variant.parse(text)


def test_names_of_loads_are_different() -> None:
    assert len({load.name for load in FULL}) == len(FULL)
    assert Load(8, 1, 2, 3, 448, 0.5).name == "c8-p2-o3-i448-r0.5"


def test_all_variants_get_the_same_requests(tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:1/v1", "m", tmp_path / "log", 1.0, 1)
    command = bench_command(Variant("w4", MODEL), server, QUICK[1], tmp_path)
    assert command[command.index("--seed") + 1] == "0"
    assert "--ignore-eos" in command
    assert "{(112, 112, 1): 1.0}" in command
