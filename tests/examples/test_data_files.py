"""The shipped data files: every line valid, images real, splits apart, vision tokens in the majority."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.tiny_world.data import CALIBRATION_CHATS, EVALUATION_CHATS, chats
from examples.tiny_world.draw import draw
from examples.tiny_world.questions import KINDS, every_sentence
from examples.tiny_world.recipe import Recipe
from examples.tiny_world.scenes import scene_from_seed
from examples.tiny_world.tokenizer import CHAT_TEMPLATE, build_tokenizer

COUNTS = {"calibration": CALIBRATION_CHATS, "evaluation": EVALUATION_CHATS}


@pytest.fixture(scope="module")
def files(examples_folder: Path) -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (examples_folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in COUNTS
    }


def picture(chat: dict) -> Image.Image:
    url = chat["messages"][0]["content"][0]["image"]
    head, encoded = url.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


@pytest.mark.parametrize("name", COUNTS)
def test_every_line_is_a_valid_chat_with_a_real_image(files, name: str) -> None:
    sentences = set(every_sentence())
    seen = set()
    for chat in files[name]:
        user, assistant = chat["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert [item["type"] for item in user["content"]] == ["image", "text"]
        assert {user["content"][1]["text"], assistant["content"]} <= sentences
        image = picture(chat)
        image.load()
        assert min(image.size) >= 112
        seen.add(image.convert("RGB").tobytes())
    assert len(files[name]) == len(seen) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_kinds_are_balanced(files, name: str) -> None:
    assert Counter(chat["task"] for chat in files[name]) == dict.fromkeys(KINDS, COUNTS[name] // len(KINDS))


def test_no_picture_is_in_two_splits(files) -> None:
    pictures = {name: {picture(chat).convert("RGB").tobytes() for chat in files[name]} for name in COUNTS}
    first, _ = Recipe().scenes_of(0)
    pictures["training"] = {draw(scene_from_seed(first + i)).convert("RGB").tobytes() for i in range(512)}
    total = sum(len(found) for found in pictures.values())
    assert len(set.union(*pictures.values())) == total


@pytest.mark.parametrize("name", COUNTS)
def test_the_generator_still_writes_the_same_chats(files, name: str) -> None:
    """Text exactly; pictures by their pixels, because another Pillow may compress or render a glyph differently."""
    for shipped, made in zip(files[name][:40], chats(name, 40), strict=True):
        assert shipped["task"] == made["task"]
        assert shipped["messages"][1] == made["messages"][1]
        assert shipped["messages"][0]["content"][1] == made["messages"][0]["content"][1]
        a, b = (picture(chat).convert("RGB") for chat in (shipped, made))
        assert (np.asarray(a) != np.asarray(b)).any(-1).sum() <= 60


@pytest.mark.parametrize("name", COUNTS)
def test_vision_tokens_are_at_least_twice_the_text_tokens(files, name: str) -> None:
    tokenizer = build_tokenizer()
    for chat in files[name]:
        text = tokenizer.apply_chat_template(chat["messages"], chat_template=CHAT_TEMPLATE, tokenize=False)
        text_tokens = len(tokenizer.encode(text)) - 1  # one placeholder stands for the image
        width, height = picture(chat).size
        assert (width // 14) * (height // 14) >= 2 * text_tokens
