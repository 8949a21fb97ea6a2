"""From the measurements in a folder to a CSV file and a table of ratios."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmq_serve.bench.plots import plot_all
from vlmq_serve.bench.rows import FLOOR, Row
from vlmq_serve.bench.variants import Load
from vlmq_serve.device import device_name

METRICS = {
    "median_ttft_ms": "TTFT ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_tpot_ms": "TPOT ms",
    "p99_tpot_ms": "TPOT p99 ms",
    "median_itl_ms": "ITL ms",
    "p99_itl_ms": "ITL p99 ms",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
}
"""What is taken from `vllm bench serve`, and what it is called in tables; medians where nothing else is said."""
FACTS = (
    "startup_s",
    "kv_tokens",
    "disk_mib",
    "ready_mib",
    "worker_mib",
    "peak_mib",
    "device_weights_mib",
    "device_mib",
)
PROMPT = "prompt tokens"
"""Of one request, its image included: what shows that the image was sent."""

PROCESSOR = "processor s/request"
"""Of all the server's processes: unlike the times, other work on the machine disturbs it little."""


def read_rows(out: Path, names: Sequence[str], timings: bool = True) -> list[Row]:
    """All measurements of the variants `names` in `out`, in that order; without `timings` one row per variant."""
    floor = _facts(out / FLOOR).get("worker_mib", 0.0) if FLOOR in names else 0.0
    rows = []
    for name in names:
        facts = _facts(out / name)
        if not facts:
            continue
        values = {key: float(facts[key]) for key in FACTS}
        if values["device_weights_mib"]:
            values["weights_mib"] = values["device_weights_mib"]
        elif floor:
            values["weights_mib"] = max(0.0, round(values["worker_mib"] - floor, 1))
        loads = sorted((out / name).glob("c*.json"), key=_load_order) if timings else []
        rows += [Row(name, path.stem, {**_times(path), **values}) for path in loads] or [Row(name, "", values)]
    return rows


def _load_order(path: Path) -> tuple[tuple[int, int], str, float, int]:
    load = Load.parse(path.stem)
    return load.image or (0, 0), load.shape, load.rate, load.concurrency


def _times(path: Path) -> dict[str, float]:
    measured = json.loads(path.read_text(encoding="utf-8"))
    times = {label: round(float(measured[key]), 3) for key, label in METRICS.items() if key in measured}
    if measured.get("completed"):
        times[PROMPT] = round(measured["total_input_tokens"] / measured["completed"])
    if measured.get("server_processor_s"):
        # The warm-up is one request more than those that are counted.
        times[PROCESSOR] = round(measured["server_processor_s"] / (measured["completed"] + 1), 3)
    return times


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "server.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def write_results(
    out: Path, name: str, names: Sequence[str], columns: Sequence[str], timings: bool
) -> tuple[list[list[str]], str]:
    """Write `out/NAME.csv`, `.md` and the plots of the variants `names`; returns the table and the device's name."""
    rows = read_rows(out, names, timings)
    device = device_name()
    write_csv(out / f"{name}.csv", rows, device)
    lines = ratio_table(rows, names[0], columns)
    text = f"{device}. `{names[0]}` in units, the others as multiples of it.\n\n{markdown(lines)}"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    plot_all(out, rows, device)
    return lines, device


def write_csv(path: Path, rows: Sequence[Row], device: str) -> None:
    """One line per variant and load, with the device's name."""
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["device", "variant", "load", *columns])
        writer.writerows([device, row.variant, row.load, *(row.values.get(c, "") for c in columns)] for row in rows)


def ratio_table(rows: Sequence[Row], baseline: str, columns: Sequence[str]) -> list[list[str]]:
    """Header and lines: the baseline's own numbers, and for the others how many times as large theirs are.

    Columns that nobody has a number for, such as a GPU's on a CPU, are left out.
    """
    columns = [column for column in columns if any(row.values.get(column) for row in rows)]
    lines = [["variant", "load", *columns]]
    base = {row.load: row for row in rows if row.variant == baseline}
    for row in rows:
        if row.variant == FLOOR or row.load not in base:
            continue
        reference = base[row.load].values
        lines.append([row.variant, row.load, *(_cell(row, reference, c, row.variant == baseline) for c in columns)])
    return lines


def _cell(row: Row, reference: dict[str, float], column: str, is_baseline: bool) -> str:
    value, base = row.values.get(column), reference.get(column)
    if value is None or base is None:
        return "-"
    if is_baseline:
        return f"{value:.4g}"
    return f"x{value / base:.2f}" if base else "-"


def markdown(lines: list[list[str]]) -> str:
    """The table in Markdown."""
    header, *body = lines
    rows = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
