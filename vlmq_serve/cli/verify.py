"""`vlmq verify`: will this checkpoint serve, and serve right?"""

from pathlib import Path
from typing import Annotated

import typer

from vlmq_serve.cli.console import err, one_line_errors, out
from vlmq_serve.format.errors import VLMQError

COLOURS = {"ok": "green", "note": "cyan", "skipped": "yellow", "error": "bold red"}


@one_line_errors
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    tp: Annotated[int, typer.Option("--tp", min=1, max=64, help="Ranks of tensor parallelism to check for.")] = 1,
) -> None:
    """Check a checkpoint as vLLM would load it, without serving it and without a GPU.

    One line per finding; exit status 1 when one of them is an error.

    Example: vlmq verify ./qwen2vl-vlmq-w4 --tp 2
    """
    from vlmq_serve.verify.finding import Level
    from vlmq_serve.verify.run import verify as run

    if not checkpoint.is_dir():
        raise VLMQError(f"{checkpoint}: no such folder; give the folder of a quantized checkpoint")
    errors = 0
    with err.status("verify") as status:
        for finding in run(checkpoint, tp, lambda name: status.update(f"verify {name}")):
            errors += finding.level == Level.ERROR
            colour = COLOURS[finding.level]
            out.print(f"[{colour}]{finding.level:<8}[/] {finding.check:<9}", end="")
            out.print(finding.message, markup=False, highlight=False, soft_wrap=True)
            status.update("verify: vLLM opens the checkpoint, about 15 s")
    if errors:
        raise typer.Exit(1)
