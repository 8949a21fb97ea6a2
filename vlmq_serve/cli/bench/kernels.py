"""`vlmq bench kernels`: our linear layers beside the dense ones of torch."""

from typing import Annotated

import typer
from rich.table import Table

from vlmq_serve.cli.console import one_line_errors, out, progress_bar


@one_line_errors
def kernels(
    scheme: Annotated[str, typer.Option(help="Bits and group size, for example w4g128.")] = "w4g128",
    seconds: Annotated[float, typer.Option(help="Time per path and M.")] = 1.0,
) -> None:
    """Compare our kernels with torch's linear in bf16 and fp32.

    Example: vlmq bench kernels --scheme w4g128
    """
    from vlmq_serve.format.scheme import Scheme
    from vlmq_serve.kernels.bench import QWEN2_VL_2B, ROWS, cpu_name, run_cpu

    results = []
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(QWEN2_VL_2B) * len(ROWS) * 5, note="")
        for result in run_cpu(QWEN2_VL_2B, ROWS, Scheme.parse(scheme), seconds):
            results.append(result)
            bar.advance(task)
    names = [n for n in dict.fromkeys(r.path for r in results) if not n.startswith("torch")]
    table = Table("layer", "M", *names, title=f"times faster than torch bf16 / fp32, {cpu_name()}")
    for layer, rows in dict.fromkeys((r.layer, r.rows) for r in results):
        cell = {r.path: r for r in results if (r.layer, r.rows) == (layer, rows)}
        ratios = [f"{cell[n].over_torch_bf16:.2f} / {cell[n].over_torch_fp32:.2f}" for n in names]
        table.add_row(layer, str(rows), *ratios)
    out.print(table)
