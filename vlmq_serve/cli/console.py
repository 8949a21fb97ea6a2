"""What all commands share on the terminal: consoles, one-line errors, progress bars."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from vlmq_serve.calibrate.resident import peak_resident_mib
from vlmq_serve.format.errors import VLMQError

P = ParamSpec("P")
R = TypeVar("R")

out = Console()
err = Console(stderr=True)


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a `VLMQError`, or what the system says of a file, into one line on stderr and exit status 1.

    Other exceptions are ours and keep their trace. For commands of typer and for the `main` of a script.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except VLMQError as error:
            message = str(error)
        except BrokenPipeError:  # the reader of a pipe has seen enough; typer ends quietly
            raise
        except OSError as error:
            if error.strerror is None:
                raise
            message = f"{error.filename or 'output'}: {error.strerror}; check the path, its permissions and free space"
        err.print("[bold red]error:[/] ", end="")
        err.print(message, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1)

    return wrapped


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `VLMQError`, before the work, where `--output` cannot become a file or, without `overwrite`, is one."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise VLMQError(f"--output {output}: the folder {folder} does not exist")
    if output.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        raise VLMQError(f"--output {output}: cannot be written; give the name of a file where you may write")
    if output.is_file() and not overwrite:
        raise VLMQError(f"--output {output}: exists already; choose another file, or overwrite it (--overwrite)")


def check_plot(option: str, path: Path) -> None:
    """Raise `VLMQError`, before the work, where matplotlib is missing or cannot draw into such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise VLMQError(f"{option}: matplotlib is not installed; pip install 'vlmq-serve[bench]'") from None
    allowed = [*FigureCanvasBase.get_supported_filetypes()]
    if path.suffix[1:].lower() not in allowed:
        raise VLMQError(f"{option} {path}: got suffix {path.suffix!r}, allowed {', '.join(allowed)}, such as plot.png")


def print_figures(table: Table) -> None:
    """Print a table at the width that it needs: figures that are cut say nothing, and a log has room."""
    # A console takes no print wider than itself; a table does.
    table.width = out.measure(table, options=out.options.update(max_width=10_000)).maximum
    out.print(table, crop=False)


def progress_bar() -> Progress:
    """A bar with count, elapsed time, estimated time left and a free text field `note`, cut where the line ends."""
    note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=note),
        console=err,
        expand=True,
    )


def hide_loading_bars() -> None:
    """Turn off the bars that transformers draws when it loads weights; they would break up ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def human_bytes(count: float) -> str:
    """`1.5 GiB`, `640.0 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} GiB"


class RichProgress:
    """Draws the stages of a calibration (`vlmq_serve.calibrate.progress.Progress`), one bar per stage."""

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task: TaskID | None = None

    def __enter__(self) -> "RichProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, title: str, total: int) -> None:
        """Begin a new bar; the one before stays as it is."""
        self._task = self._bar.add_task(title, total=total, note="")

    def advance(self, detail: str = "") -> None:
        """Count one step of the current stage."""
        if self._task is not None:
            self._bar.update(self._task, advance=1, note=f"{detail} {_peak_memory()}")

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._bar.console.print(f"note: {message}", highlight=False, soft_wrap=True)


def _peak_memory() -> str:
    return f"peak {human_bytes(peak_resident_mib() * 2**20)}"
