"""`vlmq eval`: accuracy of a model folder or of a served endpoint."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlmq_serve.cli.console import check_output, hide_loading_bars, one_line_errors, out, progress_bar
from vlmq_serve.format.errors import VLMQError

if TYPE_CHECKING:
    from vlmq_serve.calibrate.chats import Chat
    from vlmq_serve.evaluate.place import Place
    from vlmq_serve.evaluate.run import Evaluation

Answerer = Callable[[Sequence["Chat"]], Iterator[str]]


@one_line_errors
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model folder (bf16 or vlmq), or the base URL of a server: http://.../v1")
    ],
    data: Annotated[Path, typer.Option(help="JSON lines: chats with images and the expected answer.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write answers and figures as JSON.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="JSON of another evaluation on the same data: agreement and paired difference.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N chats.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chats at once (folder), or requests at once (URL).")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: Annotated[str, typer.Option(help="Folder: auto (CUDA if there is one), cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Folder: auto (float32 on a CPU, bfloat16 on CUDA), float32, bfloat16 or float16.")
    ] = "auto",
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Folder: with the activations that its calibration has simulated.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation in OUTPUT.")] = False,
) -> None:
    """Ask a model every question of a data file and compare with the expected answers.

    A folder runs in transformers (a vlmq checkpoint with its weights dequantized), a URL is asked as OpenAI clients do,
    with the key in OPENAI_API_KEY.

    Example: vlmq eval ./qwen2vl-vlmq-w4 --data eval.jsonl -o w4.json --reference bf16.json

    Example: vlmq eval http://localhost:8000/v1 --data eval.jsonl
    """
    from vlmq_serve.evaluate.place import Place
    from vlmq_serve.evaluate.run import check_questions, evaluate_chats, read_evaluation

    earlier = read_evaluation(reference) if reference else None
    check_questions(data, limit, earlier)  # a fault takes no time to find, the model minutes to load
    if output is not None:
        check_output(output, overwrite)
    remote = model.startswith(("http://", "https://"))
    if remote:
        _check_options_of_a_server(device, dtype, simulate)
    place = None if remote else Place.choose(device, dtype)
    out.print(f"evaluate {model} {f'in transformers, {place}' if place else 'over the OpenAI API'} on {data}")
    if place is None:
        answer = _remote(model, batch_size, max_new_tokens)
    else:
        answer = _local(model, place, batch_size, max_new_tokens, simulate)
    with progress_bar() as bar:
        task = bar.add_task("questions", total=None, note="")
        result = evaluate_chats(
            model,
            data,
            answer,
            place=place,
            limit=limit,
            on_answer=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if output is not None:
        output.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    out.print(accuracy_table(result, earlier))
    note = result.dtype_note(earlier) if earlier else None
    if note:
        out.print(f"note: {note}", highlight=False, soft_wrap=True)


def _check_options_of_a_server(device: str, dtype: str, simulate: bool) -> None:
    for option, value in {"--device": device, "--dtype": dtype}.items():
        if value != "auto":
            raise VLMQError(f"{option}: got {value!r} for a URL; a server computes as it was started, leave it out")
    if simulate:
        raise VLMQError(
            "--simulate: got a URL; a server computes with 16-bit activations, give the checkpoint's folder"
        )


def accuracy_table(result: "Evaluation", reference: "Evaluation | None") -> Table:
    """Accuracy per task and overall with 95 % intervals, and how the answers relate to those of `reference`."""
    table = Table(title=f"{result.model} on {result.data}", title_justify="left")
    for column in ("task", "accuracy", "95 % interval", "questions"):
        table.add_column(column, justify="right" if column != "task" else "left")
    for task, share in {**result.per_task, "all": result.overall}.items():
        low, high = share.interval
        table.add_row(task, f"{share.value:.1%}", f"{low:.1%} to {high:.1%}", str(share.total))
    if reference is not None:
        difference, agreement = result.against(reference), result.agreement(reference)
        table.add_row(
            f"minus {reference.model}",
            f"{difference.value:+.1%}",
            f"{difference.low:+.1%} to {difference.high:+.1%}",
            "",
        )
        table.add_row("same answer", f"{agreement.value:.1%}", "", str(agreement.total))
    return table


def _local(model: str, place: "Place", batch_size: int, max_new_tokens: int, simulate: bool) -> Answerer:
    from vlmq_serve.calibrate.loading import load_processor
    from vlmq_serve.evaluate.answers import answer_locally
    from vlmq_serve.evaluate.loading import load_model
    from vlmq_serve.evaluate.simulation import activation_scheme, load_simulated

    folder = Path(model)
    if not folder.is_dir():
        raise VLMQError(f"{model}: no such folder; give a model folder or a URL that starts with http:// or https://")
    hide_loading_bars()
    simulated = activation_scheme(folder) is not None
    if simulate and not simulated:
        raise VLMQError(
            f"--simulate: got {folder}, whose calibration has simulated no activations; leave the option out, or "
            "calibrate with activation_bits"
        )
    if simulated and not simulate:
        out.print("activations of 16 bits, as served; --simulate for those that its calibration has simulated")
    processor = load_processor(folder)  # first, for the same reason
    loaded = (load_simulated if simulate else load_model)(folder, place.dtype, place.device)

    def answer(chats: Sequence["Chat"]) -> Iterator[str]:
        replies = answer_locally(loaded, processor, chats, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return (reply.text for reply in replies)

    return answer


def _remote(model: str, batch_size: int, max_new_tokens: int) -> Answerer:
    from vlmq_serve.evaluate.endpoint import answer_remotely

    def answer(chats: Sequence["Chat"]) -> Iterator[str]:
        return answer_remotely(model, chats, concurrency=batch_size, max_new_tokens=max_new_tokens)

    return answer
