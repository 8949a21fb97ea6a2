"""Variants and loads of the serving benchmark, its tables and plots, and that finished parts are not measured again."""

import csv
import json
import os
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmq_serve.bench.memory import device_memory, sample
from vlmq_serve.bench.serving import ServerFacts, bench_arguments, missing_loads, note_start, run_variant
from vlmq_serve.bench.tables import markdown, ratio_table, read_rows
from vlmq_serve.bench.variants import FULL, QUICK, Load, Variant, with_arguments
from vlmq_serve.cli import app
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.server import Server
from vlmq_serve.format.errors import VLMQError

pytestmark = pytest.mark.unit
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"


def measured(out: Path, name: str, speed: float, worker: float) -> None:
    """A finished variant, as a run leaves it."""
    folder = out / name
    folder.mkdir(parents=True)
    disk = round((MODEL / "model.safetensors").stat().st_size / 2**20, 1)
    facts = ServerFacts(
        name, "auto", (), device_name(), disk, 40.0, 4096, 2 * worker, worker, 3 * worker, 0.0, 0.0
    )  # fmt: skip
    (folder / "server.json").write_text(json.dumps(asdict(facts)))
    for load in QUICK:
        result = {"median_ttft_ms": 10 / speed, "median_tpot_ms": 5 / speed, "output_throughput": 20 * speed}
        result |= {"completed": load.count, "total_input_tokens": load.count * (40 + 64 * bool(load.image))}
        (folder / f"{load.name}.json").write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, speed, worker in (("bf16", 1.0, 1000.0), ("w3", 2.0, 700.0), ("floor", 9.0, 500.0)):
        measured(tmp_path, name, speed, worker)
    return tmp_path


def test_ratios_are_to_the_first_variant_without_the_floor(results: Path) -> None:
    rows = read_rows(results, ["bf16", "w3", "floor"])
    columns = ["TPOT ms", "output tokens/s", "weights_mib", "ITL ms", "prompt tokens"]
    header, *lines = ratio_table(rows, "bf16", columns)
    assert header == ["variant", "load", "TPOT ms", "output tokens/s", "weights_mib", "prompt tokens"]
    assert {line[0] for line in lines} == {"bf16", "w3"}
    assert ["bf16", "c1-p32-o32-n3", "5", "20", "500", "40"] in lines
    assert ["bf16", "c1-p32-o16-i112-n3", "5", "20", "500", "104"] in lines
    assert ["w3", "c1-p32-o32-n3", "x0.50", "x2.00", "x0.40", "x1.00"] in lines
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


def test_only_what_is_missing_is_measured(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("w3", MODEL)
    assert missing_loads(variant, QUICK, results) is None
    (results / "w3" / f"{QUICK[1].name}.json").unlink()
    assert missing_loads(variant, QUICK, results) == [QUICK[1]]
    assert missing_loads(Variant("new", MODEL), QUICK, results) == [*QUICK]
    assert missing_loads(Variant("new", MODEL), (), results) == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(results / "python"))
    with pytest.raises(VLMQError, match="vllm: command not found"):
        run_variant(variant, [QUICK[1]], results, lambda _: None)


def test_results_of_another_setting_are_not_taken_over(results: Path) -> None:
    with pytest.raises(VLMQError, match=r"w3: was measured with arguments \[\], got \['--enforce-eager'\]"):
        missing_loads(Variant("w3", MODEL, "auto", ("--enforce-eager",)), QUICK, results)


def test_a_variant_that_fails_does_not_end_the_others(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results / "bf16" / "server.json").unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", str(results / "python"))
    arguments = ["bench", "memory", *(f"{name}={MODEL}" for name in ("w3", "bf16")), "-o", str(results)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "bf16 failed: vllm: command not found" in done.stderr
    assert "w3" in (results / "memory.csv").read_text()


class Refusing(BaseHTTPRequestHandler):
    """As `vllm serve` with a model that has no chat template."""

    def do_GET(self) -> None:
        self.reply(
            200, {"object": "list", "data": [{"id": "model", "object": "model", "created": 0, "owned_by": "us"}]}
        )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(400, {"error": {"message": "you must provide a chat template"}})

    def reply(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_model_that_cannot_chat_fails_as_a_variant_does(tmp_path: Path) -> None:
    web = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    (tmp_path / "log").touch()
    server = Server(f"http://127.0.0.1:{web.server_port}/v1", "model", tmp_path / "log", 1.0, os.getpid())
    try:
        with pytest.raises(VLMQError, match=r"first request: no answer .*must provide a chat template"):
            note_start(Variant("base", MODEL), server, tmp_path)
    finally:
        web.shutdown()
        web.server_close()


def test_arguments_for_all_and_for_one() -> None:
    variants = with_arguments([Variant("a", MODEL), Variant("b", MODEL)], ["--x=1:2", "b:--linear-backend=marlin"])
    assert [v.arguments for v in variants] == [("--x=1:2",), ("--x=1:2", "--linear-backend=marlin")]
    with pytest.raises(VLMQError, match="no variant is called 'c'"):
        with_arguments(variants, ["c:--x"])


def test_memory_of_this_process_is_seen() -> None:
    import os

    now = sample(os.getpid())
    assert now.processes_mib >= now.largest_mib > 10


def test_a_process_on_a_gpu_is_told_from_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's tool as it answers on a machine with two GPUs; where it hides processes, the total counts."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase $1 in *compute-apps*) printf "7, 500\\n8, 900\\n7, 40\\n";; *) echo 2000;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device_memory([7, 9]) == 540
    assert device_memory([1]) == 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [("w4", "expected NAME=FOLDER"), ("w4=/nowhere", "not a model folder"), (f"w4={MODEL}@int8", "got dtype 'int8'")],
)
def test_a_wrong_variant_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        Variant.parse(text)


def test_loads_are_read_as_they_are_named() -> None:
    assert len({load.name for load in FULL}) == len(FULL)
    for load in (*FULL, *QUICK):
        assert Load.parse(load.name) == load
    assert Load.parse("c8-p2-o3-i640x480-r0.5-n9") == Load(8, 2, 3, (640, 480), 0.5, 9)
    for text in ("c8", "c0-p1-o1", "c1-p1-o1-r0", "c1-p1-o1-i4y4", ""):
        with pytest.raises(VLMQError, match="load: got"):
            Load.parse(text)


def test_all_variants_get_the_same_requests_and_each_load_others(tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:1/v1", "m", tmp_path / "log", 1.0, 1)

    def seed(name: str, load: Load) -> str:
        command = bench_arguments(Variant(name, MODEL), server, load, tmp_path)
        return command[command.index("--seed") + 1]

    assert seed("w4", FULL[0]) == seed("bf16", FULL[0])
    assert len({seed("w4", load) for load in FULL}) == len(FULL)
    command = bench_arguments(Variant("w4", MODEL), server, Load(1, 2, 3, (640, 480)), tmp_path)
    assert "--ignore-eos" in command
    assert "{(480, 640, 1): 1.0}" in command  # vLLM counts height first
