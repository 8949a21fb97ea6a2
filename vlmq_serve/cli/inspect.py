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
from vlmq_serve.format.left_alone import left_alone
from vlmq_serve.format.names import part_of_model
from vlmq_serve.format.scheme import SUFFIXES


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
    out.print(_plain_table(tensors, spec))
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
    for column in ("part", "linear", "scheme", "count"):
        table.add_column(column)
    counts = Counter(
        (part_of_model(name), _leaf(name), str(spec.scheme_for(name))) for name in quantized_modules(tensors)
    )
    for (part, leaf, scheme), count in sorted(counts.items()):
        table.add_row(part, leaf, scheme, str(count))
    return table


def _leaf(name: str) -> str:
    """The last part of a name that says something: `mlp.0` rather than `0`."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _plain_table(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> Table:
    table = Table(title="Left alone", title_justify="left")
    for column in ("linear", "shape", "count", "reason"):
        table.add_column(column)
    for (kind, shape, reason), count in sorted(left_alone(tensors, spec).items()):
        table.add_row(kind, f"{shape[0]} x {shape[1]}", str(count), reason)
    return table


def _sizes_table(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> Table:
    packed: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for name in quantized_modules(tensors):
        part, info, scheme = part_of_model(name), tensors.get(f"{name}.qweight"), spec.scheme_for(name)
        packed[part] += sum(tensors[key].nbytes for s in SUFFIXES if (key := f"{name}.{s}") in tensors)
        if info is not None and scheme is not None:
            before[part] += info.shape[0] * info.shape[1] * 32 // scheme.bits * 2
    rest = sum(info.nbytes for info in tensors.values()) - packed.total()
    table = Table(title="Sizes", title_justify="left")
    for column in ("part", "now", "at 16 bit", "ratio"):
        table.add_column(column)
    rows = [(f"quantized, {part}", packed[part], before[part]) for part in sorted(packed)]
    for part, now, then in (*rows, ("the rest", rest, rest), ("all", packed.total() + rest, before.total() + rest)):
        table.add_row(part, human_bytes(now), human_bytes(then), f"{then / now:.2f}x" if now else "-")
    return table


def _provenance_table(spec: QuantizationSpec) -> Table:
    table = Table(title="Provenance", title_justify="left", show_header=False)
    rows = {"producer": spec.producer, "method": spec.method, **spec.settings, **spec.hashes}
    for key, value in rows.items():
        table.add_row(str(key), str(value))
    return table
