"""Accuracy of every method and width on held-out questions, beside the unquantized model.

    python -m benchmarks.quality.run --output benchmarks/results/quality-tiny-qwen2vl

Finished variants are kept in the work folder and not run again.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers
from rich.table import Table

from vlmq_serve.calibrate.chats import Chat
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import RichProgress, hide_loading_bars, out, progress_bar
from vlmq_serve.evaluate.answers import answer_locally
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.run import Evaluation, evaluate_chats, read_evaluation

ROOT = Path(__file__).resolve().parents[2]
UNQUANTIZED = "bf16"


def main() -> None:
    """Run what is missing, then write `OUTPUT.csv` and `OUTPUT.md` from all variants."""
    options = _options()
    hide_loading_bars()
    options.work.mkdir(parents=True, exist_ok=True)
    names = [UNQUANTIZED]
    names += [f"{method}-w{bits}g{options.group_size}" for bits in options.bits for method in options.methods]
    results = {name: _variant(name, options) for name in names}
    _write_csv(options.output.with_suffix(".csv"), results)
    _write_markdown(options.output.with_suffix(".md"), results)
    out.print(_table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwen2vl")
    parser.add_argument("--calibration", type=Path, default=ROOT / "examples" / "data" / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "examples" / "data" / "evaluation.jsonl")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "vlmq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=None, help="only the first N questions")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "quality", help="checkpoints and answers")
    parser.add_argument("--output", type=Path, required=True, help="path of the CSV and Markdown, without suffix")
    return parser.parse_args()


def _variant(name: str, options: argparse.Namespace) -> Evaluation:
    kept = options.work / f"{name}.json"
    if kept.exists():
        return read_evaluation(kept)
    folder: Path = options.model
    if name != UNQUANTIZED:
        method, _, scheme = name.partition("-w")
        bits, _, group_size = scheme.partition("g")
        folder = options.work / name
        if not folder.exists():
            recipe = make_recipe(method=method, bits=int(bits), group_size=int(group_size))
            with RichProgress() as progress:
                calibrate(options.model, folder, options.calibration, recipe, progress=progress)
    result = _evaluate(name, folder, options)
    kept.write_text(json.dumps(result.to_json()) + "\n", encoding="utf-8")
    return result


def _evaluate(name: str, folder: Path, options: argparse.Namespace) -> Evaluation:
    model, processor = load_model(folder), transformers.AutoProcessor.from_pretrained(folder)

    def answer(chats: Sequence[Chat]) -> Iterator[str]:
        return (reply.text for reply in answer_locally(model, processor, chats, max_new_tokens=8))

    with progress_bar() as bar:
        task = bar.add_task(name, total=None, note="")
        return evaluate_chats(
            name,
            options.evaluation,
            answer,
            limit=options.limit,
            on_answer=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _write_csv(path: Path, results: dict[str, Evaluation]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    reference = results[UNQUANTIZED]
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["variant", "task", "accuracy", "low", "high", "questions", "same_answer_as_bf16"])
        for name, result in results.items():
            agreement = f"{result.agreement(reference).value:.4f}"
            for task, share in {**result.per_task, "all": result.overall}.items():
                low, high = share.interval
                figures = [f"{value:.4f}" for value in (share.value, low, high)]
                writer.writerow([name, task, *figures, share.total, agreement if task == "all" else ""])


def _write_markdown(path: Path, results: dict[str, Evaluation]) -> None:
    tasks = list(results[UNQUANTIZED].per_task)
    lines = ["| variant | " + " | ".join([*tasks, "all"]) + " |", "|---|" + "--:|" * (len(tasks) + 1)]
    for name, result in results.items():
        shares = [*result.per_task.values(), result.overall]
        cells = [f"{s.value:.1%} ({s.interval[0]:.0%} to {s.interval[1]:.0%})" for s in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Paired differences in overall accuracy, 95 % intervals:", ""]
    for name, result in results.items():
        method, _, scheme = name.partition("-")
        for other in ("rtn", "gptq"):
            reference = results.get(f"{other}-{scheme}")
            if reference is not None and (method, other) in {("gptq", "rtn"), ("vlmq", "rtn"), ("vlmq", "gptq")}:
                d = result.against(reference)
                lines.append(f"- {name} minus {other}: {d.value:+.1%} ({d.low:+.1%} to {d.high:+.1%})")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(results: dict[str, Evaluation]) -> Table:
    table = Table(title="accuracy, all kinds of question", title_justify="left")
    for column in ("variant", "accuracy", "95 % interval", "same answer as bf16"):
        table.add_column(column)
    for name, result in results.items():
        low, high = result.overall.interval
        agreement = f"{result.agreement(results[UNQUANTIZED]).value:.1%}"
        table.add_row(name, f"{result.overall.value:.1%}", f"{low:.1%} to {high:.1%}", agreement)
    return table


if __name__ == "__main__":
    main()
