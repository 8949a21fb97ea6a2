"""The results on disk: CSV with a line per variant and kind of question, Markdown with a line per method."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vlmq_serve.evaluate.quality.measure import Measured
from vlmq_serve.evaluate.quality.summary import BASELINE, Row
from vlmq_serve.evaluate.quality.variants import UNQUANTIZED
from vlmq_serve.evaluate.statistics import Difference

_COLUMNS = (
    "method", "scheme", "seed", "task", "questions", "accuracy", "low", "high", "same_answer_as_bf16",
    "kl_prompt", "kl_answer", "seconds", "peak_memory_mib", "bytes",
)  # fmt: skip
ALL = "all"


def write_csv(path: Path, measured: Sequence[Measured]) -> None:
    """Accuracies with Wilson intervals; what belongs to the whole variant stands in its line `all`."""
    reference = next(m.evaluation for m in measured if m.variant.label == UNQUANTIZED)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for entry in measured:
            variant, result = entry.variant, entry.evaluation
            for task, share in {**result.per_task, ALL: result.overall}.items():
                low, high = share.interval
                line = {"method": variant.label, "scheme": variant.scheme, "seed": variant.seed, "task": task}
                line |= {"questions": share.total, "accuracy": share.value, "low": low, "high": high}
                if task == ALL:
                    line |= {"same_answer_as_bf16": result.agreement(reference).value}
                    line |= {"kl_prompt": entry.divergence.prompt, "kl_answer": entry.divergence.answer}
                    line |= {"seconds": entry.cost.seconds, "peak_memory_mib": entry.cost.peak_memory_mib}
                    line |= {"bytes": entry.cost.bytes}
                writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in line.items()})


def write_markdown(path: Path, rows: Sequence[Row], notes: Sequence[str], baseline: str = BASELINE) -> None:
    """A table of results and one of kinds of question, after the lines of `notes`."""
    tasks = list(rows[0].per_task)
    lines = [*notes, ""]
    lines += _table(result_columns(baseline), [result_cells(row) for row in rows])
    lines += ["", "Accuracy by kind of question, mean over seeds:", ""]
    kinds = [[row.label, row.scheme, *(f"{row.per_task[task]:.1%}" for task in tasks)] for row in rows]
    lines += _table(("method", "scheme", *tasks), kinds)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_columns(baseline: str = BASELINE) -> tuple[str, ...]:
    """Heads of `result_cells`."""
    figures = ("loss won back", "KL prompt", "KL answer", "seconds", "peak MiB")
    return ("method", "scheme", "seeds", "accuracy", f"minus {baseline}", *figures)


def result_cells(row: Row) -> list[str]:
    """One line of the table of results, as text."""
    won_back = "-" if row.won_back is None else f"{row.won_back:.0%}"
    cells = [row.label, row.scheme or "-", str(row.seeds) if row.scheme else "-", _percent(row.accuracy)]
    cells += ["-" if row.against is None else _percent(row.against, "+"), won_back]
    if not row.scheme:
        return [*cells, "0", "0", "-", "-"]
    cells += [f"{row.divergence.prompt:.4f}", f"{row.divergence.answer:.4f}"]
    return [*cells, f"{row.cost.seconds:.0f}", f"{row.cost.peak_memory_mib:.0f}"]


def _percent(value: Difference, sign: str = "") -> str:
    return f"{value.value:{sign}.1%} ({value.low:{sign}.1%} to {value.high:{sign}.1%})"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    return head + ["| " + " | ".join(line) + " |" for line in lines]
