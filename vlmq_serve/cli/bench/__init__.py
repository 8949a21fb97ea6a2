"""`vlmq bench`: measurements of this machine, one subcommand per file."""

import typer

from vlmq_serve.cli.bench.kernels import kernels

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

__all__ = ["app"]
