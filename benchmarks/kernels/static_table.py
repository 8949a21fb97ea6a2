"""Write (or check) the static table of the Triton kernels: registers, shared memory, instructions. Needs no GPU.

python benchmarks/kernels/static_table.py             compile every variant and write tests/kernels/static_table.csv
python benchmarks/kernels/static_table.py --check     compile and compare, exit 1 when a row is worse
"""

import argparse
import csv
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track

from vlmq_serve.kernels.compile_report import Report, Variant, compile_variant, kernel_version, variants, worse

TABLE = Path(__file__).parents[2] / "tests" / "kernels" / "static_table.csv"


def measure(variant: Variant) -> tuple[Report, str | None]:
    """Compile one variant, quietly."""
    warnings.simplefilter("ignore")
    report = compile_variant(variant)
    return report, report.fault(variant.arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table and write nothing")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    console = Console()
    cases = list(variants())
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = list(track(pool.map(measure, cases), "compiling", total=len(cases), console=console))
    rows = [{"triton": triton.__version__, "kernel": kernel_version(), **asdict(report)} for report, _ in results]
    faults = [f"{report.name}: {fault}" for report, fault in results if fault]
    if arguments.check:
        with TABLE.open() as file:
            known = {row["name"]: row for row in csv.DictReader(file)}
        for report, _ in results:
            old = known.get(report.name)
            lost = (
                ["no such row"]
                if old is None
                else [f"{c} {now}, was {then}" for c, (now, then) in worse(report, old).items()]
            )
            faults += [f"{report.name}: {', '.join(lost)}"] if lost else []
    else:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for fault in faults:
        console.print(f"[red]{fault}[/red]")
    console.print(f"{len(rows)} variants, {len(faults)} faults, Triton {triton.__version__}, kernel {kernel_version()}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
