"""The `vlmq` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import typer

from vlmq_serve.cli.bench import app as bench
from vlmq_serve.cli.calibrate import calibrate
from vlmq_serve.cli.evaluate import evaluate
from vlmq_serve.cli.export import export
from vlmq_serve.cli.inspect import inspect
from vlmq_serve.cli.report import report
from vlmq_serve.cli.verify import verify

app = typer.Typer(
    name="vlmq",
    help="Vision-language models at 2, 3 and 4 bits: calibrate with images, look inside, evaluate. "
    "Serve the result with unchanged vLLM: vllm serve OUT",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
app.command()(calibrate)
app.command()(inspect)
app.command()(verify)
app.command()(report)
app.command()(export)
app.command(name="eval")(evaluate)
app.add_typer(bench, name="bench")

__all__ = ["app"]
