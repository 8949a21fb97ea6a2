"""`vlmq bench memory`: what several widths need on disk and in memory behind `vllm serve`."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq_serve.cli.bench.serve import ARGUMENTS_HELP, SIZES, VARIANTS_HELP, run
from vlmq_serve.cli.console import one_line_errors


@one_line_errors
def memory(
    variants: Annotated[list[str], typer.Argument(help=VARIANTS_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; finished parts are kept.")],
    argument: Annotated[list[str] | None, typer.Option("--arg", help=ARGUMENTS_HELP)] = None,
) -> None:
    """Serve each variant, answer one request, and compare size on disk, memory and KV capacity.

    Writes memory.csv, memory.md and a plot; takes over what `vlmq bench serve` has measured into the same folder.

    Example: vlmq bench memory bf16=./model w4=./w4 floor=./examples/tiny-qwen2vl -o results
    """
    run(variants, (), output, argument or [], "memory", SIZES)
