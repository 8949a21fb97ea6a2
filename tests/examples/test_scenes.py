"""The generator: deterministic, its splits disjoint, its answers right against what is drawn."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from PIL import Image

from examples.tiny_world.draw import CELL, CONTENT, SIDE, draw, pixels, token_labels, whole_shape_labels
from examples.tiny_world.questions import KINDS, Question, ask, every_sentence
from examples.tiny_world.recipe import Recipe
from examples.tiny_world.scenes import COLOURS, GRID, SHAPES, SPLITS, Scene, scene_from_seed

SCENES = [scene_from_seed(seed) for seed in range(1 << 63, (1 << 63) + 150)]


def asked(kind: str) -> list[tuple[Scene, Question]]:
    return [(scene, ask(scene, kind, random.Random(scene.seed + i))) for scene in SCENES for i in range(2)]


def shape_blobs(scene: Scene, colour: str) -> list[np.ndarray]:
    """Pixel coordinates [n, 2] of each connected patch of one colour outside the chart: found in the picture alone."""
    index = np.asarray(draw(scene)).copy()
    row, column = scene.chart_cell
    index[row * CELL : (row + 2) * CELL, column * CELL : (column + 2) * CELL] = 0
    todo = {(int(y), int(x)) for y, x in np.argwhere(index == 2 + COLOURS.index(colour))}
    blobs = []
    while todo:
        stack, blob = [todo.pop()], []
        while stack:
            y, x = stack.pop()
            blob.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack.extend(near)
        blobs.append(np.array(blob))
    return [blob for blob in blobs if len(blob) > 20]


def test_same_seed_same_poster_and_questions() -> None:
    for seed in (0, 1_000_003, 1 << 40):
        first, second = scene_from_seed(seed), scene_from_seed(seed)
        assert first == second
        assert draw(first).tobytes() == draw(second).tobytes()
        assert all(ask(first, k, random.Random(7)) == ask(second, k, random.Random(7)) for k in KINDS)


def test_different_seeds_give_different_pictures() -> None:
    assert len({draw(scene).convert("RGB").tobytes() for scene in SCENES}) == len(SCENES)


def test_splits_are_disjoint_and_training_stays_in_its_own() -> None:
    for a, b in itertools.combinations(SPLITS.values(), 2):
        assert max(a.start, b.start) >= min(a.stop, b.stop)
    assert all(split.start >= 1 << 32 and split.stop <= 1 << 64 for split in SPLITS.values())
    for seed in (0, 1, 1000):
        recipe = Recipe(seed=seed)
        spans = [recipe.scenes_of(step) for step in range(recipe.steps)]
        assert all(first in SPLITS["training"] and first + n - 1 in SPLITS["training"] for first, n in spans)
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(spans))  # no scene comes twice
    assert Recipe(seed=0).scenes_of(Recipe().steps)[0] < Recipe(seed=1).scenes_of(0)[0]


def test_counts_of_colours_match_connected_patches_in_the_picture() -> None:
    checked = 0
    for scene, question in asked("count"):
        word = question.text.split()[2]
        if word in COLOURS:
            assert len(shape_blobs(scene, word)) == int(question.answer), (scene, question)
            checked += 1
    assert checked > 50


def test_position_matches_the_pixels() -> None:
    for scene, question in asked("position"):
        kind = question.text.removeprefix("Where is the ").removesuffix("?")
        (shape,) = (s for s in scene.shapes if s.kind == kind)
        centres = [blob.mean(0) for blob in shape_blobs(scene, shape.colour)]
        vertical, horizontal = question.answer.split()
        quadrant = [c for c in centres if (c[0] < SIDE / 2) == (vertical == "top")]
        assert any((c[1] < SIDE / 2) == (horizontal == "left") for c in quadrant), (scene, question)


def test_chart_answers_match_the_pixels() -> None:
    for scene, question in asked("chart"):
        row, column = scene.chart_cell
        chart = np.asarray(draw(scene))[row * CELL : (row + 2) * CELL, column * CELL : (column + 2) * CELL]
        heights = {c: int((chart == 2 + i).any(axis=1).sum()) for i, c in enumerate(COLOURS)}
        if question.text.startswith("Which"):
            assert question.answer == max(heights, key=lambda c: heights[c])
        else:
            colour = question.text.split()[4]
            assert int(question.answer) == heights[colour] // 10


def test_exists_and_unique_answers_match_the_scene() -> None:
    for scene, question in asked("exists"):
        *_, colour, kind = question.text.removesuffix("?").split()
        assert question.answer == ("yes" if any(s.colour == colour and s.kind == kind for s in scene.shapes) else "no")
    for scene, question in asked("colour"):
        kind = question.text.split()[-1].removesuffix("?")
        assert [s.colour for s in scene.shapes if s.kind == kind] == [question.answer]
    for scene, question in asked("shape"):
        colour = question.text.split()[-1].removesuffix("?")
        assert [s.kind for s in scene.shapes if s.colour == colour] == [question.answer]


def test_answers_are_balanced() -> None:
    answers = [question.answer for _, question in asked("exists")]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    places = [question.answer for _, question in asked("position")]
    assert max(places.count(place) for place in set(places)) / len(places) < 0.4


def test_every_sentence_covers_what_is_asked() -> None:
    known = set(every_sentence())
    for kind in KINDS:
        assert {text for _, q in asked(kind) for text in (q.text, q.answer)} <= known


def test_token_labels_name_what_is_there() -> None:
    for scene in SCENES[:40]:
        content = token_labels(scene)[:, 0].reshape(2 * GRID, 2 * GRID)
        for shape in scene.shapes:
            cell = content[shape.cell[0] * 2 : shape.cell[0] * 2 + 2, shape.cell[1] * 2 : shape.cell[1] * 2 + 2]
            assert (cell == CONTENT.index(shape.kind)).sum() >= 1
        row = [CONTENT[c] for c in content[2 * scene.word_row + 1]]
        letters = [name for name in row if name != "empty"]
        assert [name for name, _ in itertools.groupby(letters)] == [
            name for name, _ in itertools.groupby(scene.word.upper())
        ]


def test_every_shape_is_marked_once() -> None:
    for scene in SCENES:
        marks = whole_shape_labels(scene)
        pairs = sorted((COLOURS[(m - 1) // len(SHAPES)], SHAPES[(m - 1) % len(SHAPES)]) for m in marks[marks > 0])
        assert pairs == sorted((shape.colour, shape.kind) for shape in scene.shapes)


@pytest.mark.parametrize("seed", [3, 4])
def test_pictures_are_112_pixels_wide_and_coloured(seed: int) -> None:
    scene = scene_from_seed(seed)
    image = draw(scene)
    assert isinstance(image, Image.Image)
    assert image.size == (SIDE, SIDE) == (112, 112)
    assert pixels(scene).shape == (112, 112, 3)
    assert len(SHAPES) == len(COLOURS) == 6
