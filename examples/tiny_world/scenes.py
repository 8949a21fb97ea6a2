"""Random posters as data: what is drawn where. No pixels and no questions here.

A poster is a 4x4 grid of 28-pixel cells. One row carries a four-letter word, a 1x2 block a two-digit number, a 2x2
block a bar chart; shapes stand in the remaining six cells.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

GRID = 4
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# fmt: off
WORDS = (
    "bear", "bird", "boat", "book", "cake", "coat", "corn", "crab", "deer", "duck", "fish",
    "frog", "goat", "hand", "king", "lamp", "leaf", "lion", "milk", "moon", "nest", "rain",
    "road", "rose", "ship", "snow", "soup", "tree", "wolf", "wood", "zero", "cave",
)
# fmt: on
MAX_BAR = 5
MAX_COUNT = 4

# Scene numbers by purpose, disjoint. All have two 32-bit words: `random.Random` keeps those apart, while a number
# of one word can give the very same stream as one of two (2 and 2**32 + 2 do).
HELD_OUT = 1 << 62
SPLITS = {
    "training": range(1 << 32, HELD_OUT),
    "evaluation": range(HELD_OUT, HELD_OUT + 1_000_000),
    "calibration": range(HELD_OUT + 1_000_000, HELD_OUT + 2_000_000),
    "validation": range(HELD_OUT + 2_000_000, HELD_OUT + 3_000_000),
}
Cell = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """One shape: name, colour, grid cell (row, column), side length and offset inside its cell in pixels."""

    kind: str
    colour: str
    cell: Cell
    size: int
    offset: tuple[int, int]


@dataclass(frozen=True)
class Bar:
    """One bar of the chart; height in units, 1 to 5."""

    colour: str
    height: int


@dataclass(frozen=True)
class Scene:
    """A whole poster. `jitter`: pixel shifts (x, y) of word and number; `look` picks shades and background."""

    seed: int
    shapes: tuple[Shape, ...]
    word: str
    word_row: int
    number: int
    number_cell: Cell
    bars: tuple[Bar, ...]
    chart_cell: Cell
    text_size: int
    jitter: tuple[int, int, int, int]
    look: int

    def unique(self, attribute: str) -> tuple[Shape, ...]:
        """Shapes whose `kind` or `colour` no other shape of this poster shares."""
        values = [getattr(shape, attribute) for shape in self.shapes]
        return tuple(shape for shape in self.shapes if values.count(getattr(shape, attribute)) == 1)


@cache
def layouts() -> tuple[tuple[int, Cell, Cell, tuple[Cell, ...]], ...]:
    """All ways to lay out a poster: (word row, number cell, chart cell, the six free cells)."""
    found = []
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    for word_row in range(GRID):
        for chart in [(r, c) for r in range(GRID - 1) for c in range(GRID - 1)]:
            for number in [(r, c) for r in range(GRID) for c in range(GRID - 1)]:
                taken = [(word_row, column) for column in range(GRID)]
                taken += [(chart[0] + i, chart[1] + j) for i in (0, 1) for j in (0, 1)]
                taken += [number, (number[0], number[1] + 1)]
                if len(set(taken)) == len(taken):
                    free = tuple(cell for cell in cells if cell not in taken)
                    found.append((word_row, number, chart, free))
    return tuple(found)


def scene_from_seed(seed: int) -> Scene:
    """The poster of a scene number; the same number gives the same poster."""
    rng = random.Random(seed)
    word_row, number_cell, chart_cell, free = rng.choice(layouts())
    return Scene(
        seed=seed,
        shapes=_shapes(rng, free),
        word=rng.choice(WORDS),
        word_row=word_row,
        number=rng.randint(10, 99),
        number_cell=number_cell,
        bars=_bars(rng),
        chart_cell=chart_cell,
        text_size=rng.randint(20, 24),
        jitter=(rng.randint(-3, 3), rng.randint(-1, 2), rng.randint(-2, 2), rng.randint(-1, 2)),
        look=rng.randrange(1 << 16),
    )


def _shapes(rng: random.Random, free: tuple[Cell, ...]) -> tuple[Shape, ...]:
    """Three to six shapes; drawn again until some shape and some colour occur exactly once."""
    while True:
        kinds = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
        colours = rng.sample(COLOURS, rng.randint(2, len(COLOURS)))
        cells = rng.sample(free, rng.randint(3, len(free)))
        names = [(rng.choice(kinds), rng.choice(colours)) for _ in cells]
        by_kind, by_colour = ([name[i] for name in names] for i in (0, 1))
        if all(any(values.count(v) == 1 for v in values) for values in (by_kind, by_colour)):
            break
    shapes = []
    for (kind, colour), cell in zip(names, cells, strict=True):
        size = rng.randint(18, 24)
        slack = 26 - size
        shapes.append(Shape(kind, colour, cell, size, (1 + rng.randint(0, slack), 1 + rng.randint(0, slack))))
    return tuple(shapes)


def _bars(rng: random.Random) -> tuple[Bar, ...]:
    """Four bars of different colours with one tallest."""
    heights = [rng.randint(1, MAX_BAR) for _ in range(4)]
    while heights.count(max(heights)) > 1:
        heights = [rng.randint(1, MAX_BAR) for _ in range(4)]
    return tuple(Bar(colour, height) for colour, height in zip(rng.sample(COLOURS, 4), heights, strict=True))
