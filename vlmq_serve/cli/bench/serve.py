"""`vlmq bench serve`: latency, throughput and memory of several widths behind `vllm serve`."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlmq_serve.cli.console import err, one_line_errors, print_figures, progress_bar
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from vlmq_serve.bench.variants import Load

TIMES = ("TTFT ms", "TPOT ms", "ITL ms", "requests/s", "output tokens/s", "processor s/request", "prompt tokens")
SIZES = ("disk_mib", "weights_mib", "worker_mib", "ready_mib", "peak_mib", "device_mib", "kv_tokens", "startup_s")
VARIANTS_HELP = "NAME=FOLDER or NAME=FOLDER@DTYPE; ratios are to the first. A tiny model named floor is subtracted."
ARGUMENTS_HELP = (
    "One more argument of `vllm serve`: --arg=--max-model-len=2048, or for one variant --arg=NAME:--enforce-eager; "
    "repeatable."
)


@one_line_errors
def serve(
    variants: Annotated[list[str], typer.Argument(help=VARIANTS_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; finished parts are kept.")],
    quick: Annotated[bool, typer.Option("--quick", help="Two small loads instead of all.")] = False,
    load: Annotated[
        list[str] | None, typer.Option(help="Own loads, such as c8-p128-o64-i1280x720-r2-n16; repeatable.")
    ] = None,
    argument: Annotated[list[str] | None, typer.Option("--arg", help=ARGUMENTS_HELP)] = None,
) -> None:
    """Serve each variant, drive it with `vllm bench serve`, and compare.

    Writes one JSON per variant and load, serve.csv, serve.md and plots. Run it again to go on after an interruption.

    Example: vlmq bench serve bf16=./model w4=./w4 w3=./w3 -o results --arg=--max-model-len=4096

    A load is cCONCURRENCY-pPROMPT_TOKENS-oOUTPUT_TOKENS, with an image -iWIDTH or -iWIDTHxHEIGHT, with arrivals at a
    rate -rREQUESTS_PER_SECOND, and -nREQUESTS in all.
    """
    from vlmq_serve.bench.variants import FULL, QUICK, Load

    chosen = [Load.parse(text) for text in load or ()]
    run(variants, chosen or (QUICK if quick else FULL), output, argument or [], "serve", TIMES)


def run(
    texts: Sequence[str],
    loads: "Sequence[Load]",
    output: Path,
    arguments: Sequence[str],
    name: str,
    columns: Sequence[str],
) -> None:
    """Measure all variants under `loads`, write OUTPUT/`name`.csv and .md; one that fails does not end the others."""
    from vlmq_serve.bench.serving import missing_loads, run_variant
    from vlmq_serve.bench.tables import write_results
    from vlmq_serve.bench.variants import Variant, with_arguments

    variants = with_arguments([Variant.parse(text) for text in texts], arguments)
    output.mkdir(parents=True, exist_ok=True)
    todo = [
        (variant, missing) for variant in variants if (missing := missing_loads(variant, loads, output)) is not None
    ]
    # Ended from outside, as by `timeout`: leave as after an error, so that the server does not stay behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed: list[str] = []
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=sum(1 + len(missing) for _, missing in todo), note="")
        for variant, missing in todo:
            try:
                run_variant(variant, missing, output, lambda text: bar.update(task, advance=1, note=text))
            except VLMQError as error:
                failed.append(variant.name)
                err.print(f"{variant.name} failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    lines, device = write_results(output, name, [variant.name for variant in variants], columns, timings=bool(loads))
    table = Table(title=f"{variants[0].name} in units, the others relative to it; {device}")
    for column in lines[0]:
        table.add_column(column, no_wrap=column in ("variant", "load"), justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    print_figures(table)
    if failed:
        raise VLMQError(f"not measured: {', '.join(failed)}; the reason is above, the same command tries again")
