"""`vlmq calibrate`: a model folder and chats with images in, a packed checkpoint out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vlmq_serve.cli.console import RichProgress, err, hide_loading_bars, human_bytes, one_line_errors, out
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.names import kind_of

if TYPE_CHECKING:
    from vlmq_serve.calibrate.linear_plan import LinearPlan
    from vlmq_serve.calibrate.plan import Plan
    from vlmq_serve.calibrate.recipe import Recipe
    from vlmq_serve.calibrate.report import RunReport


@one_line_errors
def calibrate(
    model: Annotated[str, typer.Argument(help="Model folder, or the name of a model on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    data: Annotated[Path | None, typer.Option(help="JSON lines: chats with images. Not needed by rtn.")] = None,
    method: Annotated[str | None, typer.Option(help="vlmq (default), gptaq, gptq, qvlm, tlq, mbq, awq or rtn.")] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 (default) or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128 (default), or -1 for whole rows.")] = None,
    symmetric: Annotated[bool | None, typer.Option(help="Fixed zero point instead of one per group.")] = None,
    lm_head: Annotated[
        str | None, typer.Option("--lm-head", help="Quantize the head: w8g128, w4g64, w8 (own group size).")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Quantize the vision tower: w8g64, w4, rounded to nearest.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Quantize the embeddings: w8g128, w4, rounded to nearest; a tied head too.")
    ] = None,
    unfit: Annotated[
        str | None, typer.Option(help="Linears that the group size does not divide: error, ignore or group (smaller).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Chats drawn from the data file (default 512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw (default 0).")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Scale larger images down to this many pixels.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with all settings; options win over it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    save_saliency: Annotated[
        int | None, typer.Option(help="Keep the token weights of the first N samples, for pictures.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier checkpoint in OUTPUT.")] = False,
) -> None:
    """Quantize the decoder of a vision-language model, layer by layer, weighing tokens by their saliency.

    Writes OUTPUT with the packed weights, everything else byte for byte as in MODEL, and a report in OUTPUT/vlmq.

    Example: vlmq calibrate Qwen/Qwen2-VL-2B-Instruct -o qwen2vl-vlmq-w4 --data chats.jsonl

    Example: vlmq calibrate ./model -o out --data chats.jsonl --bits 3 --group-size 64 --dry-run

    Example: vlmq calibrate ./model -o out --data chats.jsonl --bits 3 --lm-head w8 --vision w8g64
    """
    from vlmq_serve.calibrate.pipeline import calibrate as run
    from vlmq_serve.calibrate.planning import make_plan
    from vlmq_serve.calibrate.recipe import load_recipe, make_recipe
    from vlmq_serve.calibrate.work import Interrupted

    given = {"method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric}
    parts = {"lm_head": lm_head, "vision": vision, "embeddings": embeddings, "unfit": unfit}
    drawn = {"samples": samples, "seed": seed, "max_pixels": max_pixels, "save_saliency": save_saliency}
    settings: dict[str, Any] = {**given, **parts, **drawn}
    settings = {key: value for key, value in settings.items() if value is not None}
    chosen = load_recipe(recipe, **settings) if recipe else make_recipe(**settings)
    if chosen.needs_data and data is None:
        raise VLMQError(f"--data: missing; method {chosen.method!r} needs chats with images (only rtn does without)")
    out.print(_plan_table(make_plan(model, chosen), chosen, output, data))
    if dry_run:
        out.print("dry run: nothing was written")
        return
    hide_loading_bars()
    try:
        with RichProgress() as progress:
            report = run(model, output, data, chosen, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt as error:
        kept = error.kept if isinstance(error, Interrupted) else None
        hint = f"; {kept} keeps the finished layers, the same command with --resume goes on" if kept else ""
        err.print(f"interrupted{hint}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    _print_report(report)


def _plan_table(plan: "Plan", recipe: "Recipe", output: Path, data: Path | None) -> Table:
    from vlmq_serve.calibrate.memory_estimate import assumed_tokens, estimate_bytes
    from vlmq_serve.calibrate.unused import unused_settings

    assumed = f" with samples of {assumed_tokens(plan)} tokens" if data else ""
    table = Table(title="Plan", title_justify="left", show_header=False)
    rows = {
        "model": f"{plan.source} ({plan.adapter.model_type}, {plan.layers} decoder layers)",
        "method": recipe.method,
        "linears": _schemes_and_sizes(plan.linears),
        "vision": _schemes_and_sizes(plan.vision),
        "lm_head": _schemes_and_sizes([plan.head] if plan.head else []),
        "embeddings": _schemes_and_sizes([plan.embeddings] if plan.embeddings else []),
        "left alone": "\n".join(_left_alone(plan)) or "-",
        "without effect": ", ".join(unused_settings(recipe)),
        "data": f"{data}, up to {recipe.samples} chats" if data else "not needed",
        "size": f"{human_bytes(plan.bytes_before)} -> {human_bytes(plan.bytes_after)}",
        "memory": f"about {human_bytes(estimate_bytes(plan, data is not None))}{assumed}",
        "output": str(output),
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    return table


def _schemes_and_sizes(linears: "Sequence[LinearPlan]") -> str:
    chosen = [linear for linear in linears if linear.scheme is not None]
    if not chosen:
        return "left as it is"
    counts = Counter(str(linear.scheme) for linear in chosen)
    before, after = (sum(getattr(linear, f"bytes_{when}") for linear in chosen) for when in ("before", "after"))
    sizes = f"{human_bytes(before)} -> {human_bytes(after)}" if before else f"{human_bytes(after)} more, untied"
    return f"{', '.join(f'{count} at {scheme}' for scheme, count in counts.items())}: {sizes}"


def _left_alone(plan: "Plan") -> list[str]:
    """Entries of the ignore list; linears that do not fit come by kind, with the reason."""
    reasons = {linear.name: linear.reason for linear in plan.all_linears if linear.reason}
    kinds = Counter((kind_of(name), reason) for name, reason in reasons.items())
    lines = [name for name in plan.recipe.ignore or () if name not in reasons]
    return lines + [f"{kind} ({count}): {reason}" for (kind, reason), count in kinds.items()]


def _print_report(report: "RunReport") -> None:
    for note in report.notes:
        out.print(f"note: {note}", highlight=False, soft_wrap=True)
    size = f"{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}"
    seconds, peak = report.details["total_seconds"], report.peak_memory_mib
    out.print(f"[green]done[/]: {report.out}, {size}, {seconds:.0f} s, peak memory {peak:.0f} MiB")
    out.print(f"report: {report.out / 'vlmq'}; serve it: vllm serve {report.out}", highlight=False, soft_wrap=True)
