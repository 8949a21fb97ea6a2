"""`vlmq bench kernels`: our linear layers beside the dense ones of torch and other packages' kernels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmq_serve.cli.console import check_output, check_plot, err, one_line_errors, out, print_figures, progress_bar
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from vlmq_serve.kernels.bench.candidates import PeerFactory
    from vlmq_serve.kernels.bench.layers import Layer
    from vlmq_serve.kernels.bench.measure import Settings

GPU_ROWS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
CPU_ROWS = "1,4,16,64,256"
QUICK_ROWS = "1,16"


@one_line_errors
def kernels(
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file; what it holds already is kept.")] = Path(
        "runs/bench-kernels.csv"
    ),
    models: Annotated[str, typer.Option(help="2B, 7B or both; the linears of Qwen2-VL. Default: 2B on a CPU.")] = "",
    layers: Annotated[str, typer.Option(help="Only these of qkv, o, gate_up, down.")] = "",
    rows: Annotated[str, typer.Option(help="Values of M.")] = "",
    bits: Annotated[str, typer.Option(help="Widths.")] = "4,3,2",
    group_size: Annotated[str, typer.Option(help="Group sizes.")] = "128",
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Codes without zero points, all that vLLM's Marlin takes at 8 bits.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="16-bit type: bf16 or fp16.")] = "bf16",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each kernel at each M.")] = 0.3,
    peers: Annotated[
        str, typer.Option(help="Other packages: vllm, gemlite (GPU), auto_round (CPU), or none.")
    ] = "vllm,gemlite,auto_round",
    quick: Annotated[bool, typer.Option("--quick", help="Only qkv and down at M 1 and 16.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file holds.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG; needs matplotlib.")] = None,
    write_table: Annotated[
        Path | None, typer.Option(help="On a GPU: also measure plans, and write the fastest for VLMQ_TABLE.")
    ] = None,
) -> None:
    """Time our kernels, torch's dense linear and, on a GPU, vLLM's kernels and GemLite where they are installed.

    Weights rotate, so that none is still in a cache; times are medians, on a GPU of replayed CUDA graphs; every
    kernel is checked against float64 in the same run. Ratios are to torch's 16-bit linear, to the fastest other
    kernel and to the floor of a measured copy. Interrupted, it goes on where it stopped.

    Example: vlmq bench kernels --models 2B,7B -o h100.csv --plot h100.png --write-table h100.json
    """
    import torch

    from vlmq_serve.cli.bench import kernel_results as results
    from vlmq_serve.cli.bench import kernel_tables
    from vlmq_serve.kernels.bench.measure import environment, measure_layer

    if threads:
        torch.set_num_threads(threads)
    settings = _settings(device, dtype, seconds)
    on_gpu = settings.device.type == "cuda"
    wanted = _layers(models or ("2B,7B" if on_gpu else "2B"), layers or ("qkv,down" if quick else ""))
    counts = _numbers("rows", rows or (QUICK_ROWS if quick else GPU_ROWS if on_gpu else CPU_ROWS))
    if min(counts) < 1:
        raise VLMQError(f"--rows: got {min(counts)}, allowed 1 and more")
    schemes = _schemes(_numbers("bits", bits), _numbers("group-size", group_size), symmetric)
    others = _peers(peers)
    where = environment(settings)
    if write_table is not None:
        kernel_tables.check(settings)
    if plot is not None:
        check_plot("--plot", plot)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_output(output, overwrite=True)
    known = [] if fresh else results.read(output, where)
    todo = {layer: results.missing(known, layer, counts, schemes) for layer in wanted}
    out.print(f"{where['device']}, copies {settings.copy_rate / 1e9:.1f} GB/s (read and written)", highlight=False)
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=sum(len(left) for left in todo.values()), note="")
        for layer, left in todo.items():
            if not left:
                continue
            bar.update(task, note=f"{layer.model} {layer.name}: preparing")
            for cell in measure_layer(layer, left, schemes, settings, others):
                results.append(output, where, cell, fresh=fresh)
                bar.update(task, advance=1, note=f"{layer.model} {layer.name}, M={cell[0].rows}")
    found = results.select(results.read(output, where), wanted, counts, schemes)
    for table in results.tables(found, where):
        print_figures(table)
    for line in results.wrong(found):
        err.print(f"[bold red]wrong or failed:[/] {line}", highlight=False)
    out.print(f"rows in {output}")
    if plot is not None:
        results.draw(found, where, plot)
        out.print(f"plot in {plot}")
    if write_table is not None:
        with progress_bar() as bar:
            task = bar.add_task("measuring plans", total=len(wanted) * len(counts), note="")
            speeds = kernel_tables.vllm_speeds(found, settings.dtype)
            written = kernel_tables.write_table(
                write_table, wanted, counts, schemes, settings, where, speeds,
                lambda note: bar.update(task, advance=1, note=note),
            )  # fmt: skip
        out.print(f"{len(written.plans)} plans, {len(written.vllm)} layers left to vLLM, in {write_table}")


def _settings(device: str, dtype: str, seconds: float) -> "Settings":
    import torch

    from vlmq_serve.kernels.bench.measure import Settings
    from vlmq_serve.kernels.bench.timing import copy_bandwidth

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in types:
        raise VLMQError(f"--dtype: got {dtype!r}, allowed {list(types)}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise VLMQError(f"--device: got {device!r}, allowed 'cpu', or 'cuda' where torch sees a GPU")
    place = torch.device(kind)
    return Settings(place, types[dtype], seconds, copy_bandwidth(place))


def _layers(models: str, names: str) -> "list[Layer]":
    from vlmq_serve.kernels.bench.layers import LAYERS

    keep = {"models": models.split(","), "layers": names.split(",") if names else [x.name for x in LAYERS]}
    allowed = {"models": {x.model for x in LAYERS}, "layers": {x.name for x in LAYERS}}
    for option, values in keep.items():
        unknown = set(values) - allowed[option]
        if unknown:
            raise VLMQError(
                f"--{option}: got {sorted(unknown)}, allowed {sorted(allowed[option])}, with commas between"
            )
    return [x for x in LAYERS if x.model in keep["models"] and x.name in keep["layers"]]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise VLMQError(f"--{option}: got {text!r}, expected whole numbers with commas between") from None


def _schemes(bits: list[int], groups: list[int], symmetric: bool) -> list[str]:
    from vlmq_serve.format.scheme import Scheme

    return [str(Scheme(width, group, symmetric)) for group in groups for width in bits]


def _peers(text: str) -> "list[PeerFactory]":
    from vlmq_serve.cli.bench.peers.auto_round import auto_round_peers
    from vlmq_serve.cli.bench.peers.gemlite import gemlite_peers
    from vlmq_serve.cli.bench.peers.vllm import vllm_peers

    known: dict[str, list[PeerFactory]] = {
        "vllm": [vllm_peers], "gemlite": [gemlite_peers], "auto_round": [auto_round_peers], "none": []
    }  # fmt: skip
    unknown = set(text.split(",")) - set(known)
    if unknown:
        raise VLMQError(f"--peers: got {sorted(unknown)}, allowed {list(known)}, with commas between")
    return [factory for name in text.split(",") for factory in known[name]]
