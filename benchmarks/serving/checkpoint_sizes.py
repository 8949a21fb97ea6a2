"""How large Qwen2-VL is at few bits, from shapes alone: seconds and no memory, also for the 7B.

    python -m benchmarks.serving.checkpoint_sizes --size 7b --output benchmarks/results/serving/sizes-7b.csv

The source is a folder whose weights are holes of the right length; the plan of a calibration reads headers only. Its
sizes are those of the files that a calibration writes, which `tests/benchmarks` checks on a small model.
"""

import argparse
import csv
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.serving.random_model import GROUP, TINY, shapes_of
from benchmarks.serving.sizes import SIZES, Size
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import one_line_errors, out
from vlmq_serve.format.headers import SINGLE_FILE

PARTS = {"lm_head": "w8", "embeddings": "w8", "vision": "w8"}
VARIANTS = [(f"w{bits}{'-all' if parts else ''}", bits, parts) for parts in ({}, PARTS) for bits in (4, 3, 2)]
"""Name, bits of the decoder, schemes of the other parts."""
COLUMNS = ("model", "variant", "bytes", "times_smaller")


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="7b")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = sizes(options.size)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    out.print(table)
    if options.output:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def sizes(name: str) -> list[dict[str, Any]]:
    """Bytes of the weights of every variant, and how many times smaller than bf16 they are."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write_holes(source, SIZES[name])
        rows = []
        for variant, bits, parts in VARIANTS:
            plan = make_plan(source, make_recipe(method="rtn", bits=bits, group_size=GROUP, **parts))
            ratio = round(plan.bytes_before / plan.bytes_after, 3)
            rows.append({"model": name, "variant": variant, "bytes": plan.bytes_after, "times_smaller": ratio})
        return [{"model": name, "variant": "bf16", "bytes": plan.bytes_before, "times_smaller": 1.0}, *rows]


def write_holes(folder: Path, size: Size) -> None:
    """A model folder whose bf16 weights take no room on the disk: their file is extended, not written."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    config = size.config(json.loads((TINY / "config.json").read_text(encoding="utf-8")))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header: dict[str, Any] = {}
    end = 0
    for tensor, shape in shapes_of(folder, size).items():
        start, end = end, end + 2 * shape.numel()
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    main()
