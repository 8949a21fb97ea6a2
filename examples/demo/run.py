"""The demo: calibrate the shipped model to W4, W3 and W2, compare, serve W4 with vLLM and ask about two images."""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import transformers
from rich.rule import Rule
from rich.table import Table

from examples.demo.picture import Asked, draw
from examples.demo.saliency import image_saliency
from vlmq_serve.calibrate.chats import Chat, message_text, read_chats
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import RichProgress, err, hide_loading_bars, human_bytes, out, progress_bar
from vlmq_serve.evaluate.answers import answer_locally, is_correct
from vlmq_serve.evaluate.endpoint import ask, connect
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.run import Evaluation, evaluate_chats
from vlmq_serve.evaluate.server import serve
from vlmq_serve.format.errors import VLMQError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-qwen2vl"
CALIBRATION = ROOT / "examples" / "data" / "calibration.jsonl"
EVALUATION = ROOT / "examples" / "data" / "evaluation.jsonl"
GROUP_SIZE = 64
WIDTHS = (4, 3, 2)
SERVED_WIDTH = 4
ASKED_TASKS = ("position", "word")
# vLLM takes most of a machine's memory for its KV cache if nobody bounds it; these are flags of its own.
BOUNDS = (
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "67108864",
    "--enforce-eager",
)


def main() -> int:
    """Run all steps; the exit status is 0 only if both served answers are the ones expected."""
    options = _options()
    signal.signal(signal.SIGTERM, _as_exit)
    hide_loading_bars()
    start = time.monotonic()
    folder: Path = options.output
    try:
        _fresh(folder)
        checkpoints = {bits: _calibrate(bits, folder) for bits in WIDTHS}
        _compare(checkpoints, options.questions)
        asked = _serve_and_ask(checkpoints, folder)
    except VLMQError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    picture = folder / "answers.png"
    draw(asked, picture, f"tiny-qwen2vl at W{SERVED_WIDTH}, served by vLLM")
    right = sum(is_correct(entry.answer, entry.expected) for entry in asked)
    out.print(f"picture: {_shown(picture)}")
    out.print(f"{right} of {len(asked)} served answers as expected, {time.monotonic() - start:.0f} s in all")
    return 0 if right == len(asked) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder, made anew")
    parser.add_argument("--questions", type=int, default=320, help="held-out questions per model")
    return parser.parse_args()


def _as_exit(_: int, __: FrameType | None) -> None:
    """Leave through the `finally` blocks, which stop the server, also when the demo is terminated."""
    sys.exit(143)


def _fresh(folder: Path) -> None:
    if folder.exists() and not (folder / ".vlmq-demo").exists():
        raise VLMQError(f"{folder}: exists and was not made by this demo; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".vlmq-demo").touch()


def _calibrate(bits: int, folder: Path) -> Path:
    target = folder / f"tiny-qwen2vl-vlmq-w{bits}"
    out.print(Rule(f"calibrate to W{bits}, group size {GROUP_SIZE}, method vlmq"))
    recipe = make_recipe(method="vlmq", bits=bits, group_size=GROUP_SIZE)
    with RichProgress() as progress:
        calibrate(MODEL, target, CALIBRATION, recipe, progress=progress)
    return target


def _compare(checkpoints: dict[int, Path], questions: int) -> None:
    out.print(Rule(f"{questions} held-out questions"))
    table = Table(title="sizes and accuracy (95 % interval)", title_justify="left")
    for column in ("model", "size", "accuracy", "interval", "same answer as bf16"):
        table.add_column(column)
    reference = _evaluate(MODEL, questions)
    _add_row(table, "bf16", MODEL, reference, reference)
    for bits, checkpoint in checkpoints.items():
        _add_row(table, f"W{bits}", checkpoint, _evaluate(checkpoint, questions), reference)
    out.print(table)


def _add_row(table: Table, name: str, folder: Path, result: Evaluation, reference: Evaluation) -> None:
    low, high = result.overall.interval
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    agreement = f"{result.agreement(reference).value:.1%}"
    table.add_row(name, human_bytes(size), f"{result.overall.value:.1%}", f"{low:.1%} to {high:.1%}", agreement)


def _evaluate(folder: Path, questions: int) -> Evaluation:
    model, processor = load_model(folder), transformers.AutoProcessor.from_pretrained(folder)

    def answer(chats: Sequence[Chat]) -> Iterator[str]:
        return (reply.text for reply in answer_locally(model, processor, chats, max_new_tokens=8))

    with progress_bar() as bar:
        task = bar.add_task(folder.name, total=questions, note="")
        return evaluate_chats(
            folder.name,
            EVALUATION,
            answer,
            limit=questions,
            on_answer=lambda n, _: bar.update(task, completed=n),
        )


def _serve_and_ask(checkpoints: dict[int, Path], folder: Path) -> list[Asked]:
    checkpoint = checkpoints[SERVED_WIDTH]
    out.print(Rule(f"vllm serve {_shown(checkpoint)}"))
    chats = _chats_to_ask(read_chats(EVALUATION))
    with err.status("vLLM starts (its imports take most of a minute)") as status:

        def show(seconds: float, line: str) -> None:
            status.update(f"vLLM starts, {seconds:.0f} s: {line[-100:]}")

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        with serve(checkpoint, folder / "vllm.log", arguments=BOUNDS, on_wait=show) as server:
            status.update("vLLM answers")
            out.print(f"ready after {server.startup_s:.0f} s at {server.base_url}")
            client, name = connect(server.base_url)
            answers = [ask(client, name, chat) for chat in chats]
    full, rounded = load_model(MODEL), load_model(checkpoints[min(WIDTHS)])
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    asked = []
    for number, (chat, answer) in enumerate(zip(chats, answers, strict=True), 1):
        image = chat.images()[0]
        image.save(folder / f"image-{number}.png")
        saliency = image_saliency(full, rounded, processor, chat)
        asked.append(Asked(image, message_text(chat.prompt[-1]), answer, chat.answer, saliency))
    out.print(_answers_table(asked, folder))
    return asked


def _chats_to_ask(chats: Sequence[Chat]) -> list[Chat]:
    """The last chat of each chosen kind: not among the questions of the comparison."""
    return [[chat for chat in chats if chat.task == task][-1] for task in ASKED_TASKS]


def _answers_table(asked: Sequence[Asked], folder: Path) -> Table:
    table = Table(title="asked through the OpenAI client", title_justify="left")
    for column in ("image", "question", "answer", "expected"):
        table.add_column(column)
    for number, entry in enumerate(asked, 1):
        image = _shown(folder / f"image-{number}.png")
        table.add_row(image, entry.question, entry.answer, entry.expected)
    return table


def _shown(path: Path) -> str:
    """The path as a user in the repository would type it."""
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
