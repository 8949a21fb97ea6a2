"""The CSV of `vlmq bench kernels`: written cell by cell, read to go on, shown as a table and a plot."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.kernels.bench.candidates import DENSE, ON_REQUEST, OURS
from vlmq_serve.kernels.bench.layers import Layer
from vlmq_serve.kernels.bench.measure import Measurement

_TYPES = {field.name: field.type for field in fields(Measurement)}


def append(path: Path, where: dict[str, str], cell: Sequence[Measurement], fresh: bool = False) -> None:
    """Add the rows of one cell; `fresh` first removes rows of the same cell and place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh and path.exists():
        _drop(path, where, cell[0])
    begin = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*where, *_TYPES])
        if begin:
            writer.writeheader()
        for row in cell:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**where, **values})


def read(path: Path, where: dict[str, str]) -> list[Measurement]:
    """Rows measured in the same place with the same versions; none where the file is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and list(reader.fieldnames) != [*where, *_TYPES]:
            raise VLMQError(f"{path}: is not a table of this command; name another file with -o")
        return [_parse(row) for row in reader if all(row[k] == v for k, v in where.items())]


def _parse(row: dict[str, str]) -> Measurement:
    readers: dict[Any, Any] = {int: int, float: float, str: str}
    return Measurement(**{name: readers[kind](row[name]) for name, kind in _TYPES.items()})


def _drop(path: Path, where: dict[str, str], cell: Measurement) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = {**where, "model": cell.model, "layer": cell.layer, "rows": str(cell.rows)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*where, *_TYPES])
        writer.writeheader()
        writer.writerows(row for row in rows if any(row[k] != v for k, v in same.items()))


def missing(known: Iterable[Measurement], layer: Layer, counts: Sequence[int], schemes: Sequence[str]) -> list[int]:
    """Values of M for which some scheme of the layer has no row yet."""
    have = {(m.rows, m.scheme) for m in known if (m.model, m.layer) == (layer.model, layer.name)}
    return [count for count in counts if any((count, scheme) not in have for scheme in schemes)]


def select(
    found: Iterable[Measurement], layers: Sequence[Layer], counts: Sequence[int], schemes: Sequence[str]
) -> list[Measurement]:
    """Rows of these cells; of a path that was measured more than once the last."""
    names = {(layer.model, layer.name) for layer in layers}
    kept = {
        (m.model, m.layer, m.rows, m.scheme, m.path): m
        for m in found
        if (m.model, m.layer) in names and m.rows in counts and m.scheme in ("", *schemes)
    }
    return list(kept.values())


def wrong(found: Iterable[Measurement]) -> Iterator[str]:
    """A line for each kernel that did not run or was further from float64 than rounding explains."""
    for m in found:
        if math.isnan(m.microseconds):
            yield f"{m.path} {m.scheme}, {m.model} {m.layer}, M={m.rows}: error {m.error:.2g}"


def tables(found: Sequence[Measurement], where: dict[str, str]) -> Iterator[Table]:
    """One per model, M across: ratio of each path to torch's 16-bit linear, geometric mean over the layers.

    For each scheme also our fastest path over the fastest other kernel, and the share of the floor that it reaches.
    """
    for model in dict.fromkeys(m.model for m in found):
        rows = [m for m in found if m.model == model]
        layers = ", ".join(dict.fromkeys(m.layer for m in rows))
        counts = _counts(rows)
        title = f"Qwen2-VL-{model} ({layers}): times faster than torch {where['dtype']}"
        table = Table("scheme", "M:", *map(str, counts), title=title, title_justify="left")
        for scheme in sorted({m.scheme for m in rows}):
            of_scheme = [m for m in rows if m.scheme == scheme]
            for path in dict.fromkeys(m.path for m in of_scheme):
                cells = [[m for m in of_scheme if (m.rows, m.path) == (count, path)] for count in counts]
                table.add_row(scheme, path, *(_show(m.over_bf16 for m in cell) for cell in cells))
            ours = [_fastest([m for m in of_scheme if m.kind == OURS and m.rows == count]) for count in counts]
            if any(ours):
                table.add_row("", "ours over the fastest other", *(_show(m.over_best_other for m in c) for c in ours))
                table.add_row("", "share of the floor", *(_show(m.of_floor for m in cell) for cell in ours))
            table.add_section()
        yield table


def _fastest(rows: Iterable[Measurement]) -> list[Measurement]:
    """The fastest row of each layer."""
    best: dict[str, Measurement] = {}
    for row in rows:
        if row.layer not in best or row.microseconds < best[row.layer].microseconds:
            best[row.layer] = row
    return list(best.values())


def _show(ratios: Iterable[float]) -> str:
    value = mean(ratios)
    return "-" if math.isnan(value) else f"{value:.2f}"


def mean(values: Iterable[float]) -> float:
    """Geometric mean; nan where a value is missing."""
    logs = [math.log(value) if value > 0 else math.nan for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def draw(found: Sequence[Measurement], where: dict[str, str], path: Path) -> None:
    """Ratio to torch's 16-bit linear over M, one panel per model and scheme; needs matplotlib."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((m.model, m.scheme) for m in found if m.scheme))
    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (model, scheme) in zip(axes, panels, strict=True):
        rows = [m for m in found if m.model == model and m.scheme in ("", scheme)]
        for name in dict.fromkeys(m.path for m in rows):
            line = [(c, [m.over_bf16 for m in rows if (m.path, m.rows) == (name, c)]) for c in _counts(rows)]
            style = {OURS: "-o", ON_REQUEST: "-^", DENSE: "--"}.get(next(m.kind for m in rows if m.path == name), ":s")
            points = [(count, mean(values)) for count, values in line if values]
            axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
        axis.set(title=f"Qwen2-VL-{model} {scheme}", xlabel="M (rows of x)")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    axes[0].set_ylabel(f"times faster than torch {where['dtype']}")
    figure.suptitle(f"{where['device']}, torch {where['torch']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _counts(rows: Sequence[Measurement]) -> list[int]:
    return sorted({m.rows for m in rows})
