"""Results of a run: one record per layer, layers.csv and run.json."""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmq_serve.calibrate.metrics import ALL
from vlmq_serve.calibrate.resident import peak_resident_mib
from vlmq_serve.calibrate.samples import MODALITIES

REPORT_FOLDER, RUN_FILE, LAYERS_FILE = "vlmq", "run.json", "layers.csv"
INPUTS_FILE = "activations.safetensors"
"""Ranges of simulated activations: `LAYER.LINEAR.low` and so on, see `activations.range_tensors`."""
LAYER_ROW = "layer"
Errors = Mapping[str, float | None]
_COLUMNS = (
    "layer", "module", "scheme", *(f"error_{m}" for m in (*MODALITIES, ALL)), "weight_error", "damping",
    *(f"importance_{m}" for m in MODALITIES), "uniform_importance", "effective_tokens", "seconds", "peak_memory_mib",
)  # fmt: skip


@dataclass(frozen=True)
class LinearResult:
    """One linear: relative squared output errors by modality, relative squared weight error, what the solver needed.

    `importance` is the mean token weight per modality (1 everywhere: no preference); empty where tokens were not
    weighted. `effective_tokens`: how many equally weighted tokens they amount to. `uniform_importance`: weighting
    was asked for, but all gradients were zero.
    """

    name: str
    scheme: str
    weight_error: float
    errors: Errors = field(default_factory=dict)
    damping: float = 0.0
    importance: Errors = field(default_factory=dict)
    uniform_importance: bool = False
    effective_tokens: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class LayerResult:
    """One decoder layer: a row of the report for each linear and one for the layer's output; the resume record."""

    index: int
    linears: tuple[LinearResult, ...]
    errors: Errors
    seconds: float
    peak_memory_mib: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "LayerResult":
        return cls(**{**raw, "linears": tuple(LinearResult(**entry) for entry in raw["linears"])})

    def rows(self) -> Iterable[dict[str, Any]]:
        """Rows of layers.csv."""
        for linear in self.linears:
            yield {
                "layer": self.index, "module": linear.name, "scheme": linear.scheme,
                **{f"error_{m}": v for m, v in linear.errors.items()}, "weight_error": linear.weight_error,
                "damping": linear.damping, **{f"importance_{m}": v for m, v in linear.importance.items()},
                "uniform_importance": linear.uniform_importance, "effective_tokens": linear.effective_tokens,
                "seconds": linear.seconds,
            }  # fmt: skip
        yield {
            "layer": self.index, "module": LAYER_ROW, **{f"error_{m}": v for m, v in self.errors.items()},
            "seconds": self.seconds, "peak_memory_mib": self.peak_memory_mib,
        }  # fmt: skip


@dataclass(frozen=True)
class RunReport:
    """A finished run: where it is, what it was asked, what it took. `details` are the further entries of run.json."""

    out: Path
    method: str
    layers: tuple[LayerResult, ...]
    bytes_before: int
    bytes_after: int
    seconds: Mapping[str, float]
    peak_memory_mib: float
    notes: tuple[str, ...]
    details: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "method": self.method,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": dict(self.seconds),
            "peak_memory_mib": self.peak_memory_mib,
            "notes": list(self.notes),
            **self.details,
        }


def write_report(folder: Path, report: RunReport) -> None:
    """Write run.json and layers.csv into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LAYERS_FILE).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for layer in report.layers:
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in layer.rows())
    write_json(folder / RUN_FILE, report.to_dict())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: a reader sees the old one or the whole new one."""
    staging = path.with_name(path.name + ".writing")
    staging.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far, plus the highest allocated CUDA memory."""
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return round(peak_resident_mib() + cuda, 1)


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
