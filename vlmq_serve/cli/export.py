"""`vlmq export`: a checkpoint for a vLLM without this package."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq_serve.cli.console import one_line_errors, out
from vlmq_serve.format.errors import VLMQError

FORMATS = ("compressed-tensors",)


@one_line_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors.")] = "compressed-tensors",
) -> None:
    """Write a checkpoint in the form of another project: the same codes, scales and zero points under other names.

    Example: vlmq export ./qwen2vl-vlmq-w4 -o qwen2vl-w4-ct --to compressed-tensors
    """
    from vlmq_serve.export.compressed_tensors import export_compressed_tensors

    if to not in FORMATS:
        raise VLMQError(f"--to: got {to!r}, allowed {list(FORMATS)}")
    if not checkpoint.is_dir():
        raise VLMQError(f"{checkpoint}: no such folder; give the folder of a quantized checkpoint")
    export_compressed_tensors(checkpoint, output)
    out.print(f"wrote {output}; vllm serve {output}", highlight=False, soft_wrap=True)
