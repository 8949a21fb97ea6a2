"""`vlmq inspect`: what is in a checkpoint, from its headers and config only."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vlmq_serve.cli.console import human_bytes, one_line_errors, out
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, find_problems, quantized_modules, read_json, read_tensor_index


@one_line_errors
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
) -> None:
    """Show schemes, sizes and provenance of a checkpoint and check that its tensors fit its config.

    Exit status 1 when they do not. No weight is loaded.

    Example: vlmq inspect ./qwen2vl-vlmq-w4
    """
    raw = read_json(checkpoint / "config.json").get("quantization_config")
    if raw is None:
        raise VLMQError(f"{checkpoint}: is not quantized (no quantization_config in config.json)")
    spec = QuantizationSpec.from_dict(raw)
    tensors = read_tensor_index(checkpoint)
    out.print(_layers_table(tensors, spec))
    out.print(_sizes_table(tensors, spec))
    out.print(_provenance_table(spec))
    if spec.simulated_activations is not None:
        bits = spec.simulated_activations
        out.print(f"note: calibrated for simulated {bits}-bit activations; served are the weights, with 16-bit ones")
    problems = find_problems(tensors, spec)
    for line in problems:
        out.print(f"[bold red]problem:[/] {line}", highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    out.print("every quantized tensor is there and fits config.json", style="green")


def _layers_table(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> Table:
    table = Table(title="Quantized linears", title_justify="left")
    for column in ("linear", "scheme", "count"):
        table.add_column(column)
    counts = Counter((name.rpartition(".")[2], str(spec.scheme_for(name))) for name in quantized_modules(tensors))
    for (leaf, scheme), count in sorted(counts.items()):
        table.add_row(leaf, scheme, str(count))
    table.add_row("left alone", ", ".join(spec.ignore) or "-", "")
    return table


def _sizes_table(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> Table:
    quantized = set(quantized_modules(tensors))
    packed = sum(info.nbytes for key, info in tensors.items() if key.rpartition(".")[0] in quantized)
    rest = sum(info.nbytes for info in tensors.values()) - packed
    before = 0
    for name in quantized:
        info, scheme = tensors.get(f"{name}.qweight"), spec.scheme_for(name)
        if info is not None and scheme is not None:
            before += info.shape[0] * info.shape[1] * 32 // scheme.bits * 2
    table = Table(title="Sizes", title_justify="left")
    for column in ("part", "now", "at 16 bit", "ratio"):
        table.add_column(column)
    for part, now, then in (("quantized linears", packed, before), ("the rest", rest, rest)):
        table.add_row(part, human_bytes(now), human_bytes(then), f"{then / now:.2f}x" if now else "-")
    table.add_row(
        "all", human_bytes(packed + rest), human_bytes(before + rest), f"{(before + rest) / (packed + rest):.2f}x"
    )
    return table


def _provenance_table(spec: QuantizationSpec) -> Table:
    table = Table(title="Provenance", title_justify="left", show_header=False)
    rows = {"producer": spec.producer, "method": spec.method, **spec.settings, **spec.hashes}
    for key, value in rows.items():
        table.add_row(str(key), str(value))
    return table
