"""One evaluation: answers, accuracy per task, agreement with a reference, and the file that keeps them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_serve.calibrate.chats import Chat, read_chats
from vlmq_serve.evaluate.answers import is_correct
from vlmq_serve.evaluate.place import Place
from vlmq_serve.evaluate.statistics import Difference, Proportion, by_task, paired_difference
from vlmq_serve.format.errors import VLMQError


@dataclass(frozen=True)
class Evaluation:
    """Answers of one model to the chats of a data file, in order.

    `device` and `dtype` are those of a model in this process; None: a server's own, or not recorded.
    """

    model: str
    data: str
    tasks: tuple[str, ...]
    expected: tuple[str, ...]
    answers: tuple[str, ...]
    device: str | None = None
    dtype: str | None = None

    @property
    def correct(self) -> list[bool]:
        return [is_correct(a, e) for a, e in zip(self.answers, self.expected, strict=True)]

    @property
    def per_task(self) -> dict[str, Proportion]:
        return by_task(self.tasks, self.correct)

    @property
    def overall(self) -> Proportion:
        return Proportion(sum(self.correct), len(self.correct))

    def agreement(self, reference: "Evaluation") -> Proportion:
        """Share of questions answered as `reference` answers them, right or wrong."""
        self._check_same_questions(reference)
        same = [is_correct(a, b) for a, b in zip(self.answers, reference.answers, strict=True)]
        return Proportion(sum(same), len(same))

    def against(self, reference: "Evaluation") -> Difference:
        """Accuracy minus that of `reference`, paired by question."""
        self._check_same_questions(reference)
        return paired_difference(self.correct, reference.correct)

    def dtype_note(self, reference: "Evaluation") -> str | None:
        """What a reader of the comparison must know when the two were not computed in one dtype."""
        if self.dtype == reference.dtype:
            return None
        mine, theirs = (entry.dtype or "a dtype that is not recorded" for entry in (self, reference))
        return f"{self.model} was computed in {mine}, {reference.model} in {theirs}: rounding is part of the difference"

    def _check_same_questions(self, other: "Evaluation") -> None:
        if self.tasks != other.tasks or self.expected != other.expected:
            raise VLMQError(
                f"reference {other.model}: was asked other questions than {self.model}; use one data file and --limit"
            )

    def to_json(self) -> dict[str, Any]:
        """Everything, with the derived figures beside it for readers of the file."""
        low, high = self.overall.interval
        tasks = {task: {"accuracy": p.value, "interval": p.interval, "n": p.total} for task, p in self.per_task.items()}
        return {
            "model": self.model,
            "data": self.data,
            "device": self.device,
            "dtype": self.dtype,
            "accuracy": self.overall.value,
            "interval": [low, high],
            "n": self.overall.total,
            "per_task": tasks,
            "tasks": list(self.tasks),
            "expected": list(self.expected),
            "answers": list(self.answers),
        }


def read_evaluation(path: str | Path) -> Evaluation:
    """Read what `vlmq eval --output` wrote."""
    try:
        raw: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {key: tuple(raw[key]) for key in ("tasks", "expected", "answers")}
        device, dtype = raw.get("device"), raw.get("dtype")  # earlier files have none
        return Evaluation(model=raw["model"], data=raw["data"], **lists, device=device, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VLMQError(f"{path}: not an evaluation that `vlmq eval --output` wrote ({error})") from None


def check_questions(data: Path, limit: int | None, reference: Evaluation | None) -> None:
    """`VLMQError`, before the work, for a faulty `data` and a `reference` that was asked other questions."""
    asked = evaluate_chats("this run", data, lambda chats: iter([""] * len(chats)), limit=limit)
    if reference is not None:
        asked.agreement(reference)


def evaluate_chats(
    model: str,
    data: str | Path,
    answer: Callable[[Sequence[Chat]], Iterator[str]],
    *,
    place: Place | None = None,
    limit: int | None = None,
    on_answer: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask `answer`, which computes at `place`, all chats of `data` (the first `limit`); `on_answer(done, total)`
    follows each one."""
    chats = read_chats(Path(data))[:limit]
    answers = []
    for text in answer(chats):
        answers.append(text)
        if on_answer is not None:
            on_answer(len(answers), len(chats))
    return Evaluation(
        model=model,
        data=Path(data).name,
        tasks=tuple(chat.task or "all" for chat in chats),
        expected=tuple(chat.answer for chat in chats),
        answers=tuple(answers),
        device=str(place.device) if place else None,
        dtype=place.dtype_name if place else None,
    )
