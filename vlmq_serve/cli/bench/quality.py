"""`vlmq bench quality`: methods x schemes x calibration seeds on one model, one data file and the same questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vlmq_serve.cli.console import (
    RichProgress,
    check_output,
    check_plot,
    err,
    hide_loading_bars,
    one_line_errors,
    out,
    print_figures,
)
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from vlmq_serve.evaluate.quality.measure import Measured

METHODS = ["rtn", "gptq", "gptaq", "vlmq"]


@one_line_errors
def quality(
    model: Annotated[Path, typer.Argument(help="Folder of the unquantized model.")],
    data: Annotated[Path, typer.Option(help="JSON lines: chats to calibrate with.")],
    questions: Annotated[Path, typer.Option(help="JSON lines: chats with images and the expected answer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Path of .csv, .md and .png, without suffix.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Method, with settings if need be: vlmq:exponent=2,samples=64. Repeatable.")
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="w3g64, w2g-1, w4g128s ... Repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the draw of samples. Repeatable.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Chats per calibration (default 512).")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first N questions.")] = None,
    divergence_chats: Annotated[int, typer.Option(min=1, help="Questions for the KL divergence to bf16.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8,
    baseline: Annotated[str, typer.Option(help="One of the methods; the others are compared with it.")] = "gptq",
    work: Annotated[Path, typer.Option(help="Finished variants; a second run goes on from there.")] = Path(
        "out/quality"
    ),
    device: Annotated[
        str, typer.Option(help="Of answers and KL: auto, cpu, cuda or cuda:1. A calibration's: vlmq:device=cpu.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of answers and KL: auto (float32, bfloat16 on CUDA), float32, bfloat16 or float16.")
    ] = "auto",
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Keep them in the work folder.")] = False,
) -> None:
    """Compare calibration methods: accuracy per kind, intervals, difference to GPTQ, KL divergence, time, memory.

    Every variant is calibrated in a process of its own and kept when it is done; what is kept is not run again.

    Example: vlmq bench quality ./model --data calibration.jsonl --questions evaluation.jsonl -o results/quality

    Settings: ... --method gptq --method vlmq --method vlmq:exponent=2 --scheme w2g-1 --seed 0 --seed 1 --samples 64
    """
    from vlmq_serve.evaluate.place import Place
    from vlmq_serve.evaluate.quality.measure import Bench
    from vlmq_serve.evaluate.quality.variants import Selection

    if not model.is_dir():
        raise VLMQError(f"{model}: no such folder; give the folder of the unquantized model")
    shared: dict[str, Any] = {} if samples is None else {"samples": samples}
    variants = Selection(method or METHODS, scheme or ["w4g64", "w3g64", "w2g64"], seed or [0], shared).variants()
    if baseline != "gptq" and baseline not in {variant.label for variant in variants}:
        raise VLMQError(f"--baseline: got {baseline!r}, which is none of the methods; add --method {baseline}")
    bench = Bench(
        model, data, questions, work, RichProgress, limit, divergence_chats, max_new_tokens, keep_checkpoints,
        Place.choose(device, dtype),
    )  # fmt: skip
    bench.check(variants)
    _check_outputs(output)
    hide_loading_bars()
    measured = []
    for number, variant in enumerate(variants, 1):
        kept = " (kept)" if bench.record(variant).exists() else ""
        err.print(f"{number} of {len(variants)}: {variant.name}{kept}", highlight=False)
        measured.append(bench.measure(variant))
    _write(_files(output), measured, bench.describe(variants), baseline)


def _files(output: Path) -> tuple[Path, ...]:
    """What is written: CSV, Markdown and a plot."""
    return tuple(output.with_name(output.name + suffix) for suffix in (".csv", ".md", ".png"))


def _check_outputs(output: Path) -> None:
    """Before the work, which may take hours."""
    if not output.name or output.is_dir():
        raise VLMQError(f"--output {output}: is a folder; give the files in it a name, such as {output / 'quality'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in _files(output):
        check_output(path, overwrite=True)
    check_plot("--output", _files(output)[-1])


def _write(files: Sequence[Path], measured: "list[Measured]", notes: list[str], baseline: str) -> None:
    from vlmq_serve.evaluate.quality.plot import write_plot
    from vlmq_serve.evaluate.quality.summary import summarise
    from vlmq_serve.evaluate.quality.tables import result_cells, result_columns, write_csv, write_markdown

    table_file, text_file, plot_file = files
    rows = summarise(measured, baseline)
    write_csv(table_file, measured)
    write_markdown(text_file, rows, notes, baseline)
    write_plot(plot_file, rows)
    table = Table(*result_columns(baseline), title="95 % intervals in brackets", title_justify="left")
    for row in rows:
        table.add_row(*result_cells(row))
    print_figures(table)
    out.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
