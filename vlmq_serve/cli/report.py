"""`vlmq report`: a calibration as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq_serve.cli.console import check_output, one_line_errors, out
from vlmq_serve.format.errors import VLMQError


@one_line_errors
def report(
    run: Annotated[Path, typer.Argument(help="Folder that vlmq calibrate wrote, or its folder vlmq.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Page to write; default: report.html.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page in OUTPUT.")] = False,
) -> None:
    """Draw a calibration: errors by layer and modality, token importance, time, memory, sizes.

    The page is one file and loads nothing.

    Example: vlmq report ./qwen2vl-vlmq-w4 -o w4.html
    """
    from vlmq_serve.calibrate.page.render import write_page

    if not run.is_dir():
        raise VLMQError(f"{run}: no such folder; give a folder that vlmq calibrate wrote")
    target = output or Path("report.html")
    check_output(target, overwrite)
    write_page(run, target)
    out.print(f"wrote {target}, {target.stat().st_size / 1024:.0f} KiB", highlight=False, soft_wrap=True)
