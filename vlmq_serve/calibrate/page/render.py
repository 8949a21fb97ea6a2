"""Puts figures and plots of a run into the page."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from vlmq_serve.calibrate.page import plots
from vlmq_serve.calibrate.page.read import RunRecord, number, read_run

_SECTIONS = (
    ("Error of the layers", "||y_q - y||² / ||y||² behind each decoder layer: it holds what all layers before added.",
     plots.layer_errors),
    ("Error of the linears", "Outputs of each linear against those of the unquantized model, darker is worse.",
     plots.linear_errors),
    ("Importance", "Mean weight of a modality's tokens, 1 is no preference. The first layer has no gradient yet.",
     plots.importance),
    ("Effective tokens", "(Σ l)² / Σ l²: how many tokens of equal weight the weights amount to. Below the width of a "
     "linear its Hessian knows less than the linear can use.", plots.effective_tokens),
    ("Time and memory", "", plots.cost),
    ("Size", "Tensors of the checkpoint by part.", plots.sizes),
)  # fmt: skip
_COLUMNS = ("module", "scheme", "error_all", "weight_error", "damping", "effective_tokens", "seconds")


def write_page(run: Path, output: Path) -> None:
    """Write the page about the run in folder `run` to `output`: one file that needs no other."""
    output.write_text(render(read_run(run)), encoding="utf-8")


def render(record: RunRecord) -> str:
    """The page as text."""
    drawn = [(title, text, plot(record)) for title, text, plot in _SECTIONS]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        (files("vlmq_serve.calibrate.page") / "report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"{Path(str(record.run['model'])).name}, {record.run['method']}",
        tiles=_tiles(record),
        notes=record.run["notes"],
        sections=[(title, text, plot) for title, text, plot in drawn if plot is not None],
        columns=_COLUMNS,
        rows=[[_cell(row.get(column, "")) for column in _COLUMNS] for row in record.linears],
        stages=record.run["seconds"],
        facts=_facts(record.run),
    )


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    run = record.run
    tokens = run.get("data", {}).get("tokens", {})
    schemes = list(dict.fromkeys(row["scheme"] for row in record.linears))
    tiles = [
        ("scheme", ", ".join(schemes)),
        ("size", f"{run['bytes_before'] / 2**20:.1f} → {run['bytes_after'] / 2**20:.1f} MiB"),
        ("time", f"{run['total_seconds']:.0f} s"),
        ("peak memory", f"{run['peak_memory_mib']:.0f} MiB"),
    ]
    if tokens:
        tiles.append(("samples", str(run["data"]["samples"])))
        tiles += [(f"{name} tokens", f"{count:,}") for name, count in tokens.items()]
    return tiles


def _facts(run: Any) -> dict[str, str]:
    keep = ("producer", "model", "model_type", "device", "dtype")
    facts = {key: str(run[key]) for key in keep if key in run}
    facts |= {f"recipe {key}": str(value) for key, value in run["recipe"].items() if value is not None}
    return facts | {f"hash {key}": str(value) for key, value in run["hashes"].items()}


def _cell(text: str) -> str:
    try:
        value = number(text)
    except ValueError:
        return text
    return "" if value is None else f"{value:.4g}"
