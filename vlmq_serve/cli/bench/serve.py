"""`vlmq bench serve`: latency, throughput and memory of several widths behind `vllm serve`."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlmq_serve.cli.console import one_line_errors, out, progress_bar
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from vlmq_serve.bench.variants import Load

TIMES = ("TTFT ms", "TPOT ms", "ITL ms", "output tokens/s", "startup_s")
SIZES = ("disk_mib", "weights_mib", "worker_mib", "ready_mib", "peak_mib", "device_weights_mib", "kv_tokens")
VARIANTS_HELP = "NAME=FOLDER or NAME=FOLDER@DTYPE; ratios are to the first. A tiny model named floor is subtracted."
ARGUMENTS_HELP = "One more argument of `vllm serve`, for example --arg=--max-model-len=2048; repeatable."


@one_line_errors
def serve(
    variants: Annotated[list[str], typer.Argument(help=VARIANTS_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; finished parts are kept.")],
    quick: Annotated[bool, typer.Option("--quick", help="Two small loads instead of all.")] = False,
    argument: Annotated[list[str] | None, typer.Option("--arg", help=ARGUMENTS_HELP)] = None,
) -> None:
    """Serve each variant, drive it with `vllm bench serve`, and compare.

    Writes one JSON per variant and load, serve.csv, serve.md and plots. Run it again to go on after an interruption.

    Example: vlmq bench serve bf16=./model w4=./w4 w3=./w3 -o results --arg=--max-model-len=4096
    """
    from vlmq_serve.bench.variants import FULL, QUICK

    measure(variants, QUICK if quick else FULL, output, argument or [], "serve", TIMES)


def measure(
    texts: Sequence[str],
    loads: "Sequence[Load]",
    output: Path,
    arguments: Sequence[str],
    name: str,
    columns: Sequence[str],
) -> None:
    """Measure all variants under `loads` and write OUTPUT/`name`.csv and .md."""
    import torch

    from vlmq_serve.bench.plots import plot_all
    from vlmq_serve.bench.serving import run_variant
    from vlmq_serve.bench.tables import markdown, ratio_table, read_rows, write_csv
    from vlmq_serve.bench.variants import Variant
    from vlmq_serve.kernels.bench.measure import device_name

    variants = [Variant.parse(text) for text in texts]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise VLMQError(f"variants: got the names {names}, each must be different")
    output.mkdir(parents=True, exist_ok=True)
    # Ended from outside, as by `timeout`: leave as after an error, so that the server does not stay behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with progress_bar() as bar:
        task = bar.add_task("variants", total=len(variants), note="")
        for variant in variants:
            run_variant(variant, loads, output, arguments, lambda text: bar.update(task, note=text))
            bar.advance(task)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = read_rows(output, names, timings=bool(loads))
    write_csv(output / f"{name}.csv", rows, device)
    lines = ratio_table(rows, names[0], columns)
    (output / f"{name}.md").write_text(f"{device}\n\n{markdown(lines)}", encoding="utf-8")
    plot_all(output, rows)
    table = Table(*lines[0], title=f"{names[0]} in units, the others relative to it; {device}", title_justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    out.print(table)
