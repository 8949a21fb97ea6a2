"""What commands print."""

import errno
import io
import os

import pytest
from rich.console import Console
from rich.table import Table

from vlmq_serve.cli import console


@pytest.mark.unit
def test_figures_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=sink, width=20))
    table = Table("variant", "output tokens/s", "processor s/request")
    table.add_row("w4-int8", "x1.97", "x0.56")
    console.print_figures(table)
    lines = sink.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert all(cell in sink.getvalue() for cell in ("output tokens/s", "processor s/request", "w4-int8", "x0.56"))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "file/x"), "error: file/x: Not a directory; "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "error: output: No space left on device; "),
    ],
)
def test_what_the_system_says_of_a_file_is_one_line(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=sink))

    @console.one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        command()
    assert exit_info.value.code == 1
    assert sink.getvalue().startswith(message)
    assert len(sink.getvalue().splitlines()) == 1


@pytest.mark.unit
@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), KeyError("ours")])
def test_faults_of_our_own_and_closed_pipes_are_left_alone(error: Exception) -> None:
    @console.one_line_errors
    def command() -> None:
        raise error

    with pytest.raises(type(error)):
        command()
