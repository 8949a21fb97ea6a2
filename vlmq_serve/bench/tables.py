"""From the measurements in a folder to a CSV file and a table of ratios."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = {
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "median_itl_ms": "ITL ms",
    "p99_itl_ms": "ITL p99 ms",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
}
"""What is taken from `vllm bench serve`, and what it is called in tables."""
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
FLOOR = "floor"
"""A variant of this name is a model with next to no weights: what its worker needs is subtracted from the others."""


@dataclass(frozen=True)
class Row:
    """One variant under one load; `load` is empty for a measurement of memory only."""

    variant: str
    load: str
    values: dict[str, float]


def read_rows(out: Path, names: Sequence[str], timings: bool = True) -> list[Row]:
    """All measurements of the variants `names` in `out`, in that order; without `timings` one row per variant."""
    floor = _facts(out / FLOOR).get("worker_mib", 0.0) if FLOOR in names else 0.0
    rows = []
    for name in names:
        facts = _facts(out / name)
        if not facts:
            continue
        values = {key: float(facts[key]) for key in FACTS}
        if floor:
            values["weights_mib"] = max(0.0, round(values["worker_mib"] - floor, 1))
        loads: list[Path | None] = [*sorted((out / name).glob("c*.json"))] if timings else []
        for path in loads or [None]:
            measured = json.loads(path.read_text(encoding="utf-8")) if path else {}
            times = {label: round(float(measured[key]), 3) for key, label in METRICS.items() if key in measured}
            rows.append(Row(name, path.stem if path else "", {**times, **values}))
    return rows


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "server.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def write_csv(path: Path, rows: Sequence[Row], device: str) -> None:
    """One line per variant and load, with the device's name."""
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["device", "variant", "load", *columns])
        writer.writerows([device, row.variant, row.load, *(row.values.get(c, "") for c in columns)] for row in rows)


def ratio_table(rows: Sequence[Row], baseline: str, columns: Sequence[str]) -> list[list[str]]:
    """Header and lines: the baseline's own numbers, and for the others how many times as large theirs are."""
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
