"""Questions about a poster and their answers: eight kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.tiny_world.scenes import COLOURS, GRID, MAX_BAR, MAX_COUNT, SHAPES, WORDS, Scene


@dataclass(frozen=True)
class Question:
    """One question with its only accepted answer; `kind` is the task name in the data files."""

    kind: str
    text: str
    answer: str


def plural(kind: str) -> str:
    """Plural of a shape name."""
    return kind + ("es" if kind.endswith("s") else "s")


def ask(scene: Scene, kind: str, rng: random.Random) -> Question:
    """Ask one question of a kind about a poster; `rng` chooses among the possible ones."""
    text, answer = _ASK[kind](scene, rng)
    return Question(kind, text, answer)


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.unique("kind"))
    return f"What colour is the {shape.kind}?", shape.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.unique("colour"))
    return f"What shape is {shape.colour}?", shape.kind


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    by_answer: dict[int, list[str]] = {}
    for colour in COLOURS:
        number = sum(shape.colour == colour for shape in scene.shapes)
        by_answer.setdefault(number, []).append(f"How many {colour} shapes are there?")
    for kind in SHAPES:
        number = sum(shape.kind == kind for shape in scene.shapes)
        by_answer.setdefault(number, []).append(f"How many {plural(kind)} are there?")
    # The answer is drawn first, so that no answer is right most of the time.
    answer = rng.choice([number for number in by_answer if number <= MAX_COUNT])
    return rng.choice(by_answer[answer]), str(answer)


def _position(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.unique("kind"))
    vertical = "top" if shape.cell[0] < GRID // 2 else "bottom"
    horizontal = "left" if shape.cell[1] < GRID // 2 else "right"
    return f"Where is the {shape.kind}?", f"{vertical} {horizontal}"


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    present = {(shape.colour, shape.kind) for shape in scene.shapes}
    if rng.random() < 0.5:
        (colour, kind), answer = rng.choice(sorted(present)), "yes"
    else:
        # Half of the absent pairs are hard: the colour and the shape are both there, but on different shapes.
        absent = [(c, k) for c in COLOURS for k in SHAPES if (c, k) not in present]
        kinds, colours = {k for _, k in present}, {c for c, _ in present}
        crossed = [(c, k) for c, k in absent if c in colours and k in kinds]
        (colour, kind), answer = rng.choice(crossed if crossed and rng.random() < 0.5 else absent), "no"
    return f"Is there a {colour} {kind}?", answer


def _word(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "What does the word say?", scene.word


def _number(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "What number is in the box?", str(scene.number)


def _chart(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return "Which bar is the tallest?", max(scene.bars, key=lambda bar: bar.height).colour
    bar = rng.choice(scene.bars)
    return f"How tall is the {bar.colour} bar?", str(bar.height)


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "exists": _exists,
    "word": _word,
    "number": _number,
    "chart": _chart,
}
KINDS = tuple(_ASK)


def every_sentence() -> list[str]:
    """Every question and every answer that can occur: the corpus of the tokenizer."""
    questions = ["What does the word say?", "What number is in the box?", "Which bar is the tallest?"]
    questions += [f"What colour is the {kind}?" for kind in SHAPES]
    questions += [f"Where is the {kind}?" for kind in SHAPES]
    questions += [f"What shape is {colour}?" for colour in COLOURS]
    questions += [f"How many {plural(kind)} are there?" for kind in SHAPES]
    questions += [f"How many {colour} shapes are there?" for colour in COLOURS]
    questions += [f"How tall is the {colour} bar?" for colour in COLOURS]
    questions += [f"Is there a {colour} {kind}?" for colour in COLOURS for kind in SHAPES]
    answers = [*COLOURS, *SHAPES, *WORDS, "yes", "no"]
    answers += [f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right")]
    answers += [str(n) for n in range(max(MAX_COUNT, MAX_BAR) + 1)] + [str(n) for n in range(10, 100)]
    return questions + answers
