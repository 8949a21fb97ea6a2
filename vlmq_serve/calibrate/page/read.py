"""Reads the report of a finished run."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_serve.calibrate.report import LAYER_ROW, LAYERS_FILE, REPORT_FOLDER, RUN_FILE
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json, read_tensor_index
from vlmq_serve.format.scheme import SUFFIXES

Row = Mapping[str, str]
_SHOWN = {
    "model", "method", "layers", "recipe", "hashes", "notes", "bytes_before", "bytes_after", "seconds", "total_seconds",
    "peak_memory_mib",
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """`run` as in run.json; rows of layers.csv for all `linears` and for the decoder's whole `layers`.

    `sizes`: bytes of the checkpoint's tensors by part, empty where the report lies without its checkpoint.
    """

    folder: Path
    run: Mapping[str, Any]
    linears: tuple[Row, ...]
    layers: tuple[Row, ...]
    sizes: Mapping[str, int]

    @property
    def decoder(self) -> list[Row]:
        """Linears of the decoder layers; the head and the vision tower have records behind theirs."""
        return [row for row in self.linears if int(row["layer"]) < self.run["layers"]]

    @property
    def kinds(self) -> list[str]:
        """Short names of the linears of a decoder layer, in order."""
        return list(dict.fromkeys(row["module"].rpartition(".")[2] for row in self.decoder))

    def series(self, kind: str, column: str) -> list[float | None]:
        """A column over the layers for the linears of one short name; None where it is empty."""
        return [number(row[column]) for row in self.decoder if row["module"].endswith(f".{kind}")]


def number(text: str) -> float | None:
    """A cell of layers.csv; None where it is empty or not a number."""
    value = float(text) if text else float("nan")
    return value if value == value else None


def read_run(path: Path) -> RunRecord:
    """`path` is a checkpoint that `vlmq calibrate` wrote, or its folder `vlmq`; `VLMQError` where it is neither."""
    folder = path / REPORT_FOLDER if (path / REPORT_FOLDER).is_dir() else path
    for name in (RUN_FILE, LAYERS_FILE):
        if not (folder / name).is_file():
            raise VLMQError(f"{path}: holds no {name} of a calibration; give a folder that vlmq calibrate wrote")
    run = read_json(folder / RUN_FILE)
    with (folder / LAYERS_FILE).open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    absent = _SHOWN - run.keys()
    if absent or not rows:
        raise VLMQError(f"{folder}: got a run.json without {sorted(absent)}, or an empty layers.csv; calibrate again")
    whole = tuple(row for row in rows if row["module"] == LAYER_ROW and int(row["layer"]) < run["layers"])
    linears = tuple(row for row in rows if row["module"] != LAYER_ROW)
    return RunRecord(folder, run, linears, whole, _sizes(folder.parent))


def _sizes(checkpoint: Path) -> dict[str, int]:
    if not (checkpoint / "config.json").is_file():
        return {}
    sizes = dict.fromkeys((*SUFFIXES, "other tensors"), 0)
    for name, info in read_tensor_index(checkpoint).items():
        suffix = name.rpartition(".")[2]
        sizes[suffix if suffix in SUFFIXES else "other tensors"] += info.nbytes
    return sizes
