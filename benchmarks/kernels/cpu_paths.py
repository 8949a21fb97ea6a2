"""Compare the CPU paths with torch's bf16 and fp32 linear on two layers of Qwen2-VL-2B; table and CSV.

python benchmarks/kernels/cpu_paths.py --scheme w4g128 -o benchmarks/kernels/cpu_paths.csv
"""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.bench import QWEN2_VL_2B, ROWS, Measurement, cpu_name, run_cpu


def show(results: list[Measurement], console: Console) -> None:
    """A row per layer and M, the ratios of every path to torch bf16 and fp32 (above 1 is faster)."""
    names = [n for n in dict.fromkeys(r.path for r in results) if not n.startswith("torch")]
    table = Table("layer", "M", *names, title=f"times faster than torch bf16 / fp32, {cpu_name()}")
    for layer, rows in dict.fromkeys((r.layer, r.rows) for r in results):
        cell = {r.path: r for r in results if (r.layer, r.rows) == (layer, rows)}
        ratios = [f"{cell[n].over_torch_bf16:.2f} / {cell[n].over_torch_fp32:.2f}" for n in names]
        table.add_row(layer, str(rows), *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", type=Scheme.parse, default=Scheme(4, 128))
    parser.add_argument("--seconds", type=float, default=1.0, help="time per path and M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    cells = len(QWEN2_VL_2B) * len(ROWS) * 5
    measured = run_cpu(QWEN2_VL_2B, ROWS, arguments.scheme, arguments.seconds)
    results = list(track(measured, "measuring", total=cells, console=console))
    show(results, console)
    if arguments.output:
        clock = "process" if arguments.threads == 1 else "wall"
        device = {"cpu": cpu_name(), "threads": arguments.threads, "clock": clock, "torch": torch.__version__}
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*device, *asdict(results[0])])
            writer.writeheader()
            for result in results:
                values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(result).items()}
                writer.writerow({**device, **values})
        console.print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
