"""`vlmq bench`: measurements of this machine, one subcommand per file."""

import typer

from vlmq_serve.cli.bench.kernels import kernels
from vlmq_serve.cli.bench.memory import memory
from vlmq_serve.cli.bench.quality import quality
from vlmq_serve.cli.bench.serve import serve

app = typer.Typer(
    help="Measure on this machine: kernels, serving, memory, quality.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)


@app.callback()
def bench() -> None:
    """Measure on this machine. Every number is a ratio or a median, with the device's name beside it."""


app.command()(kernels)
app.command()(quality)
app.command()(serve)
app.command()(memory)

__all__ = ["app"]
