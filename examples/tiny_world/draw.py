"""Posters as pixels, and what stands under each vision token (labels for the auxiliary training head)."""

from __future__ import annotations

import base64
import io
import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.tiny_world.scenes import COLOURS, GRID, MAX_BAR, SHAPES, WORDS, Scene, Shape

CELL = 28
SIDE = CELL * GRID
TOKEN = 14
TOKENS_PER_SIDE = SIDE // TOKEN
BAR_UNIT = 10

BACKGROUNDS = ((255, 255, 255), (240, 240, 225), (228, 232, 238), (236, 226, 232))
INKS = ((0, 0, 0), (60, 40, 30), (30, 40, 70))
SHADES = {
    "red": ((220, 30, 30), (190, 20, 40)),
    "green": ((30, 160, 50), (20, 130, 60)),
    "blue": ((30, 60, 220), (50, 80, 190)),
    "yellow": ((240, 200, 20), (225, 185, 40)),
    "purple": ((150, 40, 170), (125, 45, 150)),
    "cyan": ((30, 200, 210), (60, 185, 200)),
}
LETTERS = tuple(sorted({letter.upper() for word in WORDS for letter in word}))
CONTENT = ("empty", *SHAPES, *LETTERS, *"0123456789", "bar")
# One softmax each: what is under the token, its colour, the height of its bar, the token's own row and column.
LABEL_SIZES = (len(CONTENT), len(COLOURS) + 1, MAX_BAR + 1, TOKENS_PER_SIDE, TOKENS_PER_SIDE)
WHOLE_SHAPES = 1 + len(COLOURS) * len(SHAPES)


def draw(scene: Scene) -> Image.Image:
    """Draw a poster as a 112x112 palette image (8 colours, no anti-aliasing: PNG stays small)."""
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([value for rgb in _palette(scene.look) for value in rgb])
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    for shape in scene.shapes:
        _draw_shape(pen, shape)
    for letter, (left, top) in _glyphs(scene):
        pen.text((left, top), letter, fill=1, font=_font(scene.text_size), anchor="ms")
    row, column = scene.number_cell
    frame = (column * CELL + 1, row * CELL + 1, (column + 2) * CELL - 2, (row + 1) * CELL - 2)
    pen.rectangle(frame, outline=1)
    for bar, (left, bottom) in _bar_places(scene):
        pen.rectangle((left, bottom - bar.height * BAR_UNIT, left + 9, bottom), fill=_ink(bar.colour))
    row, column = scene.chart_cell
    base = (row + 2) * CELL - 2
    pen.line((column * CELL + 1, base, (column + 2) * CELL - 2, base), fill=1)
    return image


def pixels(scene: Scene) -> np.ndarray:
    """The poster as uint8 [112, 112, 3]."""
    return np.asarray(draw(scene).convert("RGB"))


def data_url(scene: Scene) -> str:
    """The poster as a self-contained PNG data URL."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def token_labels(scene: Scene) -> np.ndarray:
    """What stands under each vision token: int64 [64, 5], one column per entry of `LABEL_SIZES`."""
    labels = np.zeros((TOKENS_PER_SIDE, TOKENS_PER_SIDE, len(LABEL_SIZES)), dtype=np.int64)
    labels[:, :, 3] = np.arange(TOKENS_PER_SIDE)[:, None]
    labels[:, :, 4] = np.arange(TOKENS_PER_SIDE)[None, :]
    for shape in scene.shapes:
        left, top = shape.cell[1] * CELL + shape.offset[0], shape.cell[0] * CELL + shape.offset[1]
        box = labels[_covered(top, top + shape.size), _covered(left, left + shape.size)]
        box[..., 0], box[..., 1] = CONTENT.index(shape.kind), 1 + COLOURS.index(shape.colour)
    for letter, (centre, base) in _glyphs(scene):
        box = labels[_covered(base - 15, base), _covered(centre - 7, centre + 7)]
        box[..., 0] = CONTENT.index(letter)
    for bar, (left, bottom) in _bar_places(scene):
        box = labels[_covered(bottom - bar.height * BAR_UNIT, bottom), _covered(left, left + 10)]
        box[..., 0], box[..., 1] = CONTENT.index("bar"), 1 + COLOURS.index(bar.colour)
        box[..., 2] = bar.height
    return labels.reshape(-1, len(LABEL_SIZES))


def whole_shape_labels(scene: Scene) -> np.ndarray:
    """Colour and kind together, at the one token under each shape's centre: int64 [64], 0 elsewhere.

    One mark per shape, however many tokens it touches, is what counting needs; the pair is what "is there a red ring"
    needs.
    """
    labels = np.zeros((TOKENS_PER_SIDE, TOKENS_PER_SIDE), dtype=np.int64)
    for shape in scene.shapes:
        left, top = shape.cell[1] * CELL + shape.offset[0], shape.cell[0] * CELL + shape.offset[1]
        centre = (top + shape.size // 2) // TOKEN, (left + shape.size // 2) // TOKEN
        labels[centre] = 1 + COLOURS.index(shape.colour) * len(SHAPES) + SHAPES.index(shape.kind)
    return labels.reshape(-1)


def _covered(start: int, stop: int) -> slice:
    """Tokens that a span of pixels enters within their first 5 pixels and covers for at least 5; never none."""
    first, last = (start + 9) // TOKEN, (stop + 9) // TOKEN
    return slice(max(first, 0), max(last, first + 1))


def _palette(look: int) -> list[tuple[int, int, int]]:
    """Index 0 background, 1 ink, then the colours; `look` chooses among the shades."""
    palette = [BACKGROUNDS[look % 4], INKS[look // 4 % 3]]
    return palette + [SHADES[colour][look // (12 << i) % 2] for i, colour in enumerate(COLOURS)]


def _ink(colour: str) -> int:
    return 2 + COLOURS.index(colour)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _glyphs(scene: Scene) -> list[tuple[str, tuple[int, int]]]:
    """Letters and digits with the pixel (x, y) of the middle of their base line."""
    dx, dy, dx_number, dy_number = scene.jitter
    base = scene.word_row * CELL + 22 + dy
    glyphs = [(c.upper(), (14 + CELL * i + dx, base)) for i, c in enumerate(scene.word)]
    row, column = scene.number_cell
    for i, digit in enumerate(str(scene.number)):
        glyphs.append((digit, (column * CELL + 17 + 22 * i + dx_number, row * CELL + 21 + dy_number)))
    return glyphs


def _bar_places(scene: Scene) -> list:
    """Bars with the pixel (x, y) of their lower left corner."""
    row, column = scene.chart_cell
    return [(bar, (column * CELL + 2 + 14 * i, (row + 2) * CELL - 3)) for i, bar in enumerate(scene.bars)]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    left, top = shape.cell[1] * CELL + shape.offset[0], shape.cell[0] * CELL + shape.offset[1]
    size, ink = shape.size, _ink(shape.colour)
    box = (left, top, left + size - 1, top + size - 1)
    if shape.kind == "circle":
        pen.ellipse(box, fill=ink)
    elif shape.kind == "square":
        pen.rectangle(box, fill=ink)
    elif shape.kind == "ring":
        pen.ellipse(box, outline=ink, width=4)
    elif shape.kind == "cross":
        third = size // 3
        pen.rectangle((left + third, top, left + size - 1 - third, top + size - 1), fill=ink)
        pen.rectangle((left, top + third, left + size - 1, top + size - 1 - third), fill=ink)
    else:
        corners = _TRIANGLE if shape.kind == "triangle" else _STAR
        pen.polygon([(left + x * (size - 1), top + y * (size - 1)) for x, y in corners], fill=ink)


_TRIANGLE = ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0))
_STAR = tuple(
    (0.5 + r * math.sin(i * math.pi / 5), 0.53 - r * math.cos(i * math.pi / 5)) for i, r in enumerate((0.53, 0.21) * 5)
)
