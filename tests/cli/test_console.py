"""What commands print."""

import io

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
